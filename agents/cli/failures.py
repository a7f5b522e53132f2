"""Turns what a reading command can meet into one clear line and exit status 1."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from aiokafka.errors import KafkaError

from agents.kafka_clients import TopicMissingError
from agents.settings import Settings
from agents.stores.ports import StoreError, StoreUnavailable
from streams.decoding import UnreadableRecordError


@contextmanager
def one_line_errors(settings: Settings) -> Iterator[None]:
    """Print a store's, Kafka's or a record's error with address and remedy, and exit with status 1."""
    try:
        with _quiet("aiokafka", "cassandra"):
            yield
    except StoreUnavailable as error:
        remedy = "; `personas up` starts a local one, PERSONAS_CASSANDRA_HOSTS and _PORT name another"
        _fail(f"{error}{remedy if 'does not answer' in str(error) else ''}")
    except KafkaError as error:
        _fail(
            f"Kafka at {settings.kafka_bootstrap} does not answer ({type(error).__name__}); "
            "`personas up` starts a local one, PERSONAS_KAFKA_BOOTSTRAP names another"
        )
    except (StoreError, TopicMissingError, UnreadableRecordError) as error:
        _fail(str(error))


@contextmanager
def _quiet(*libraries: str) -> Iterator[None]:
    """These libraries log at length what the line says."""
    levels = {name: logging.getLogger(name).level for name in libraries}
    for name in libraries:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _fail(message: str) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)
