"""Kill -9 at random moments and at named fault points, on a real cluster: `python -m tests.faults.run` (`make faults`).

Runs the trials (tests/support/faults/runs.py), and compares each with an undisturbed run. With `--mode packed`, the
runs chunk in packed mode. With `--storage s3`, the roots are on an S3 server on loopback, which is not killed. Prints a
table and writes the ratios trials, lost, duplicated and differing to `build/bench/faults.json`; each other mode and
storage has a file of its own (`faults_packed.json`, `faults_s3.json`, `faults_packed_s3.json`). Exit 1 where any of the
last three ratios is not 0, where the time was too short for all trials, or where a fault point was hit less than ten
times in sixty trials.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from tests.support import bench_results as results
from tests.support import s3_server
from tests.support.faults.drivers import REPOSITORY
from tests.support.faults.experiment import MODES
from tests.support.faults.runs import LANDINGS, PLACES, TRIALS, Results, run
from tests.support.faults.trials import plan
from tests.support.standalone import KINDS

FOLDER = REPOSITORY / "build" / "faults"
VICTIMS = ("driver", *KINDS[1:])


def kills_by_place(found: Results) -> list[dict[str, str | int]]:
    """Delivered kills, a row a place."""
    places = [*PLACES, *(f"{stage} at random" for stage in ("ingest", "score", "refine"))]
    counts = [{kind: found.landed[kind, place] for kind in VICTIMS} for place in places]
    return [{"killed": place, **row, "all": sum(row.values())} for place, row in zip(places, counts, strict=True)]


def missed_points(found: Results) -> list[str]:
    """Fault points with too few kills."""
    return [place for place in PLACES if sum(found.landed[kind, place] for kind in VICTIMS) < LANDINGS]


def report(found: Results, n_trials: int, name: str) -> bool:
    """Prints the tables and writes the ratios into the file `name`; whether all is as it should be."""
    rows = kills_by_place(found)
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    names = ("lost", "duplicated", "differing")
    totals = {name: found.total(name) for name in names}
    kills = sum(found.landed.values())
    restarts = sum(outcome.restarts for outcome in found.outcomes)
    line = [len(found.outcomes), kills, restarts, *totals.values(), f"{found.seconds:.0f}"]
    print(results.table(["trials", "kills", "restarts", *names, "seconds"], [line]))
    results.record(name, {"trials": len(found.outcomes), **totals}, rows, key="kills")
    missed = missed_points(found)
    if n_trials >= TRIALS and missed:
        print(f"expected {LANDINGS} kills at each fault point; fewer at {', '.join(missed)}")
    return len(found.outcomes) == n_trials and not any(totals.values()) and not (n_trials >= TRIALS and missed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seconds", type=float, default=4500.0, help="no trial is begun after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default="document", help="ingest.chunking.mode of the runs")
    parser.add_argument("--storage", choices=("local", "s3"), default="local", help="storage of the roots")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with contextlib.ExitStack() as stack:
        roots = None
        if arguments.storage == "s3":
            stack.enter_context(s3_server.running())
            roots = f"s3a://{s3_server.BUCKET}/faults"
        trials = plan(arguments.trials, arguments.seed)
        found = run(trials, FOLDER, arguments.seed, arguments.seconds, arguments.mode, roots)
    parts = ("faults", arguments.mode if arguments.mode != "document" else "", "s3" if roots else "")
    return 0 if report(found, arguments.trials, "_".join(filter(None, parts))) else 1


if __name__ == "__main__":
    sys.exit(main())
