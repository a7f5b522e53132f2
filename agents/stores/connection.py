"""Opening a Cassandra session, and turning the driver's errors into the store's two classes."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

from cassandra import (
    AuthenticationFailed,
    ConsistencyLevel,
    InvalidRequest,
    ProtocolVersion,
    Unauthorized,
    UnresolvableContactPoints,
)
from cassandra.auth import PlainTextAuthProvider

from agents.settings import Settings, SettingsError
from agents.stores.ports import StoreError, StoreRejected, StoreUnavailable

try:
    from cassandra.io.libevreactor import LibevConnection
except ImportError:  # the driver then silently falls back to slower reactors that fail reads under load
    LibevConnection = None

CONNECT_SECONDS: Final = 5.0
REQUEST_SECONDS: Final = 5.0
_KEYSPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,47}")
_SCHEMA_MISSING: Final = re.compile(r"unconfigured table|(keyspace|table) \S+ does not exist", re.IGNORECASE)


def address(settings: Settings) -> str:
    """Contact points and port, as messages show them."""
    return f"{settings.cassandra_hosts} port {settings.cassandra_port}"


def open_cluster(settings: Settings) -> Any:  # noqa: ANN401
    """A driver Cluster for these settings, not yet connected. Blocking (it resolves names): call it in a
    thread.

    Raises SettingsError for an unusable setting, StoreRejected without the driver's libev extension,
    StoreUnavailable if a contact point has no address.
    """
    if LibevConnection is None:
        raise StoreRejected(
            "cassandra-driver has no libev reactor on this Python, and its asyncio and asyncore reactors are "
            "refused because they fail reads. Use CPython 3.11 or 3.12 on Linux with cassandra-driver's wheel"
        )
    _check_settings(settings)
    driver_log = logging.getLogger("cassandra")
    if driver_log.level == logging.NOTSET:  # it logs with tracebacks what callers get as a StoreError anyway
        driver_log.setLevel(logging.CRITICAL)
    # Imported after the check: this module picks a default reactor, and raises where there is none.
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
    from cassandra.policies import DCAwareRoundRobinPolicy, ExponentialReconnectionPolicy, TokenAwarePolicy
    from cassandra.query import tuple_factory

    profile = ExecutionProfile(
        load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy(settings.cassandra_datacenter)),
        consistency_level=ConsistencyLevel.LOCAL_QUORUM,
        serial_consistency_level=ConsistencyLevel.LOCAL_SERIAL,
        request_timeout=REQUEST_SECONDS,
        row_factory=tuple_factory,
    )
    credentials = None
    if settings.cassandra_username:
        credentials = PlainTextAuthProvider(settings.cassandra_username, settings.cassandra_password)
    try:
        return Cluster(
            contact_points=[host.strip() for host in settings.cassandra_hosts.split(",")],
            port=settings.cassandra_port,
            auth_provider=credentials,
            connection_class=LibevConnection,
            protocol_version=ProtocolVersion.V5,
            execution_profiles={EXEC_PROFILE_DEFAULT: profile},
            # The driver's default waits up to ten minutes between attempts to reach a host again.
            reconnection_policy=ExponentialReconnectionPolicy(0.5, 5.0, max_attempts=None),
            connect_timeout=CONNECT_SECONDS,
            control_connection_timeout=CONNECT_SECONDS,
            idle_heartbeat_interval=5,
            idle_heartbeat_timeout=5,
            application_name="viewer-personas",
        )
    except UnresolvableContactPoints as error:
        raise StoreUnavailable(
            f"no address found for Cassandra at {address(settings)}; check PERSONAS_CASSANDRA_HOSTS"
        ) from error


def open_session(cluster: Any, settings: Settings) -> Any:  # noqa: ANN401
    """Connect `cluster` and return its session; on an error shut the cluster down. Blocking: call it in a
    thread.

    Raises StoreUnavailable if Cassandra cannot be reached.
    """
    try:
        return cluster.connect()
    except Exception as error:
        cluster.shutdown()
        raise store_error(error, settings) from error


def store_error(error: Exception, settings: Settings) -> StoreError:
    """The store's error for what the driver raised.

    Only a request that Cassandra calls invalid is rejected. A missing table or permission is a fault of the
    installation that can be mended while callers wait, so it counts as unavailable, as does every other
    error.
    """
    where = f"Cassandra at {address(settings)}"
    if isinstance(error, StoreError):
        return error
    if isinstance(error, InvalidRequest) and not _SCHEMA_MISSING.search(str(error)):
        return StoreRejected(f"{where} refused the request: {error}")
    if isinstance(error, InvalidRequest):
        return StoreUnavailable(f"{where} lacks the schema ({error}); run `personas init`")
    if isinstance(error, Unauthorized):
        return StoreUnavailable(f"{where} does not permit this: {error}; grant the user rights on the keyspace")
    causes = list(getattr(error, "errors", {}).values()) if isinstance(getattr(error, "errors", None), dict) else []
    if any(isinstance(cause, AuthenticationFailed) for cause in [error, *causes]):
        return StoreUnavailable(
            f"{where} refused the log-in; check PERSONAS_CASSANDRA_USERNAME and PERSONAS_CASSANDRA_PASSWORD"
        )
    detail = "; ".join(sorted({str(cause) for cause in causes})) or str(error)
    return StoreUnavailable(f"{where} does not answer ({type(error).__name__}: {detail})")


def _check_settings(settings: Settings) -> None:
    if not _KEYSPACE.fullmatch(settings.cassandra_keyspace):
        raise SettingsError(
            f"PERSONAS_CASSANDRA_KEYSPACE={settings.cassandra_keyspace!r} must be a lower-case letter "
            "followed by up to 47 lower-case letters, digits or underscores"
        )
    if not settings.cassandra_hosts.strip(" ,"):
        raise SettingsError("PERSONAS_CASSANDRA_HOSTS is empty; give host,...")
    if settings.history_versions < 1:
        raise SettingsError(f"PERSONAS_HISTORY_VERSIONS={settings.history_versions} must be at least 1")
    if not 0 <= settings.persona_ttl_days <= 7300:
        raise SettingsError(f"PERSONAS_PERSONA_TTL_DAYS={settings.persona_ttl_days} must be 0 (keep) to 7300")
