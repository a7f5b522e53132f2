"""Find the Page-Hinkley threshold on null streams and write the artefact that ships as agents/data/thresholds.json.

    .venv/bin/python benchmarks/calibrate_thresholds.py [--target 2.0] [--viewers 60] [--seed 1] [--out FILE]

Prints false alarms per 1,000 events of stable viewers by class, on calibration seeds and on reporting seeds that
calibration never saw. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson

from streams.simulation import RATES, Stream, Viewer, divergence_null, false_alarms, run_rule, simulate
from streams.trigger import Policy, Thresholds

SETTLED = 200
POLICY = Policy(template_after=0, maximum_age_days=0)
INITIAL = Thresholds("uncalibrated", 2.0, 0.02, 10, 4.0, 16, 8, ((5.0, 0.64), (140.0, 0.14)))


def streams(seed: int, viewers: int) -> dict[str, list[Stream]]:
    return {
        name: [simulate(Viewer(rate), np.random.default_rng([seed, i, n])) for i in range(viewers)]
        for n, (name, rate) in enumerate(RATES.items())
    }


def false_per_1k(null: dict[str, list[Stream]], thresholds: Thresholds) -> dict[str, float]:
    rates = {}
    for name, group in null.items():
        alarms = sum(false_alarms(run_rule(stream, 64, POLICY, thresholds), SETTLED) for stream in group)
        rates[name] = 1000 * alarms / sum(len(stream.ts) - SETTLED for stream in group)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=2.0, help="false alarms and follow-ups per 1,000 events")
    parser.add_argument("--viewers", type=int, default=60, help="viewers per class")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    null = streams(arguments.seed, arguments.viewers)
    low, high = 0.5, 6.0
    for _ in range(9):
        middle = (low + high) / 2
        rates = false_per_1k(null, replace(INITIAL, page_hinkley=middle))
        mean = sum(rates.values()) / len(rates)
        print(f"h {middle:.3f}: {mean:.2f} false per 1,000  {rates}", file=sys.stderr)
        low, high = (middle, high) if mean > arguments.target else (low, middle)
    chosen = replace(INITIAL, page_hinkley=round(high, 3))
    reported = false_per_1k(streams(arguments.seed + 1000, arguments.viewers), chosen)
    table = divergence_null([3, 5, 10, 20, 40, 80, 160, 320], np.random.default_rng(arguments.seed))
    artefact = {
        "format": 1,
        "name": f"simulated-null-{arguments.target:g}-per-1000",
        "page_hinkley": chosen.page_hinkley,
        "delta": chosen.delta,
        "minimum_runs": chosen.minimum_runs,
        "maturity_factor": chosen.maturity_factor,
        "follow_up_after": chosen.follow_up_after,
        "cool_down": chosen.cool_down,
        "divergence_null": table,
        "calibrated_on": {
            "command": f"benchmarks/calibrate_thresholds.py --target {arguments.target:g} "
            f"--viewers {arguments.viewers} --seed {arguments.seed}",
            "false_per_1k_on_other_seeds": {name: round(rate, 2) for name, rate in reported.items()},
        },
    }
    if arguments.out:
        arguments.out.write_bytes(orjson.dumps(artefact, option=orjson.OPT_INDENT_2) + b"\n")
    print(orjson.dumps({"page_hinkley": chosen.page_hinkley, "false_per_1k": reported}).decode())


if __name__ == "__main__":
    main()
