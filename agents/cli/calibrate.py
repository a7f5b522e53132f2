"""`personas calibrate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from agents.settings import Settings, load_settings

if TYPE_CHECKING:
    from agents.calibration import Floats, Histories


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Ranges let nan through."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number", context, parameter)
    return value


@click.command()
@click.argument("events", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--target",
    type=click.FloatRange(min=0.01, max=1000),
    default=1.4,
    show_default=True,
    callback=_finite,
    help="Wanted refreshes per 1,000 watches of viewers whose taste does not change.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [thresholds.json]")
@click.option(
    "--registry", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Registry to use as is."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of the simulated viewers, and of how a log is split and shuffled.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0.01, max=10),
    default=1.0,
    show_default=True,
    callback=_finite,
    help="Of the simulated populations; 1 is 400 viewers of each class.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def calibrate(
    events: Path | None,
    target: float,
    out: Path | None,
    registry: Path | None,
    seed: int,
    scale: float,
    as_json: bool,
) -> None:
    """Find the thresholds for a wanted rate of false refreshes, and write them for PERSONAS_THRESHOLDS.

    Without EVENTS the estimator's constants and the threshold come from simulated viewers: this made the packaged
    file. With EVENTS (JSON lines, .gz or not, as for `personas replay`) the constants are those that predict half of
    the log's viewers best, and the threshold is found on the log with each viewer's days shuffled, where nothing
    drifts. The other half shows how well they predict, in bits a watch, beside plain decayed counts.

    \b
    personas calibrate --target 2 --out thresholds.json
    personas calibrate events.jsonl.gz --registry registry-v1 --out thresholds.json --json
    PERSONAS_THRESHOLDS=thresholds.json personas worker --role watch
    """
    from agents.calibration import CalibrationError, calibrate_on_log, calibrate_on_simulation
    from agents.event_log import UnreadableFile, read_lines

    target_file = out or Path("thresholds.json")

    if not target_file.resolve().parent.is_dir():
        raise click.ClickException(f"cannot write {target_file}: there is no such folder")

    def progress(text: str) -> None:
        click.echo(text, err=True)

    try:
        if events is None:
            result = calibrate_on_simulation(seed, target, scale, progress)
        else:
            settings = load_settings()
            settings = settings if registry is None else replace(settings, registry=registry)
            lines = read_lines(events)
            histories, priors, skipped = _read(settings, lines)
            progress(f"{len(histories.clusters):,} watches of {len(histories):,} viewers, {skipped:,} lines left out")
            digest = sha256(b"\n".join(lines)).hexdigest()[:8]
            result = calibrate_on_log(f"{events.name}@{digest}", histories, priors, seed, target, progress)
        target_file.write_bytes(orjson.dumps(result.document, option=orjson.OPT_INDENT_2) + b"\n")
    except (CalibrationError, UnreadableFile) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write {target_file}: {error.strerror}") from error
    figures = {"thresholds": str(target_file), "regret": result.document["regret"], **result.figures}
    if as_json:
        click.echo(orjson.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name:22} {value}")


def _read(settings: Settings, lines: Sequence[bytes]) -> tuple[Histories, Floats, int]:
    """Qualifying watches by viewer in order; the registry's shares by cluster id; the number of lines left out."""
    import numpy as np

    from agents.calibration import joined
    from agents.event_log import load_event_log

    log = load_event_log(lines, settings)
    watches: dict[str, list[tuple[int, int]]] = {}
    for event, cluster in log.watches():
        watches.setdefault(event.user_id, []).append((event.ts, cluster))
    histories = []
    for user in sorted(watches):
        in_order = sorted(watches[user], key=lambda watch: watch[0])
        histories.append((np.array([ts for ts, _ in in_order]), np.array([cluster for _, cluster in in_order])))
    kept = sum(map(len, watches.values()))
    return joined(histories), log.registry.prior_by_id, len(log.records) - kept
