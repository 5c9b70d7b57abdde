"""Kill -9 at random moments and at named fault points, on a real cluster: `python -m tests.faults.run` (`make faults`).

Starts a standalone cluster (one master, two workers, pretended GPUs) and two drivers, prepares a root, runs the trials
(`trials.plan`), and holds each against an undisturbed run. With `--mode packed`, the runs chunk in packed mode. Prints
a table and writes `build/bench/faults.json` (packed: `faults_packed.json`) with the ratios trials, lost, duplicated and
differing. Exit 1 where any of the last three is not 0, where the time was too short for all trials, or where a fault
point was hit less than ten times in sixty trials.
"""

import argparse
import collections
import dataclasses
import logging
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench import results
from tests.support.faults import experiment
from tests.support.faults.check import Root, read_root
from tests.support.faults.drivers import REPOSITORY, DriverPool
from tests.support.faults.experiment import MODES, Mode
from tests.support.faults.points import POINTS
from tests.support.faults.trials import Bench, Outcome, Trial, plan, run_trial
from tests.support.standalone import KINDS, StandaloneCluster

LOGGER = logging.getLogger("miniplm.faults")

FOLDER = REPOSITORY / "build" / "faults"
LANDINGS = 10
TRIALS = 60
PLACES = [f"{stage} {name}" for stage, names in POINTS.items() for name in names]
VICTIMS = ("driver", *KINDS[1:])
_RUN_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of all trials. `landed` are the delivered kills by (kind, place)."""

    outcomes: list[Outcome]
    landed: collections.Counter[tuple[str, str]]
    seconds: float

    def total(self, name: str) -> int:
        return sum(getattr(outcome.differences, name) for outcome in self.outcomes)


def run(trials: Sequence[Trial], folder: Path, seed: int, seconds: float, mode: Mode) -> Results:
    """Runs the trials, as many as can be begun in the time.

    Args:
        folder: emptied first; keeps all logs, and the roots of the trials that found something.
        seconds: from the start of the cluster on.
        mode: of chunking.
    """
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    outcomes: list[Outcome] = []
    # GPUs to spare: an executor that is dying and the one in its place have one each, for two drivers.
    with StandaloneCluster(folder / "cluster", workers=2, cores=8, gpus=6) as cluster:
        conf = {**cluster.driver_conf(), "spark.executorEnv.PYTHONPATH": str(REPOSITORY)}
        with DriverPool(cluster.url, conf, folder) as drivers:
            bench = prepare(cluster, drivers, folder, random.Random(seed), mode)
            LOGGER.info("prepared in %.0f s", time.monotonic() - start)
            for number, trial in enumerate(trials):
                if time.monotonic() - start > seconds:
                    LOGGER.warning("the time is up after %d of %d trials", number, len(trials))
                    break
                outcomes.append(run_trial(bench, trial, number))
                _log(number, outcomes[-1])
    return Results(outcomes, bench.landed, time.monotonic() - start)


def prepare(cluster: StandaloneCluster, drivers: DriverPool, folder: Path, chosen: random.Random, mode: Mode) -> Bench:
    """Runs the experiment undisturbed, and keeps what it had left before each stage."""
    experiment.write_input(folder / "input")
    seconds: dict[str, float] = {}
    ingested, whole = folder / "ingested", folder / "whole"
    _undisturbed(drivers, folder, ingested, ["ingest"], mode, seconds)
    shutil.copytree(ingested, whole)
    _undisturbed(drivers, folder, whole, ["score", "refine"], mode, seconds)
    expected = read_root(whole)
    _check_is_worth_it(expected, mode)
    prepared = {
        "ingest": None,
        "score": ingested,
        "matrix": _without(whole, "scored", "_checkpoints/score_matrix-*", "tables/score_matrix"),
        "refine": _without(whole, "in-matrix"),
    }
    return Bench(cluster, drivers, folder, folder / "input", mode, prepared, expected, seconds, chosen)


def _without(whole: Path, name: str, *patterns: str) -> Path:
    """A copy of a root without its refined corpora, and without what fits the patterns."""
    copy = whole.parent / name
    shutil.copytree(whole, copy)
    for pattern in (*patterns, "tables/refined", "tables/corpora"):
        for place in copy.glob(pattern):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return copy


def _undisturbed(
    drivers: DriverPool, folder: Path, root: Path, stages: list[str], mode: Mode, seconds: dict[str, float]
) -> None:
    """Runs stages to their end, and notes how long each took."""
    driver = drivers.current()
    command = {"root": str(root), "input": str(folder / "input"), "stages": stages, "mode": mode}
    driver.send({**command, "varying": False, "keyed": False, "stop": None})
    stage, since = "", time.monotonic()
    while True:
        event = driver.event(_RUN_SECONDS)
        if stage:
            seconds[stage] = time.monotonic() - since
        if event["event"] == "done":
            return
        if event["event"] == "failed":
            raise RuntimeError(f"the undisturbed run failed: {event['error']}")
        stage, since = event["stage"], time.monotonic()


def _check_is_worth_it(root: Root, mode: Mode) -> None:
    """Trials on an experiment without rejects in every micro-batch would never stop between two writes."""
    assert bool(root.keys) == (mode == "packed"), f"{len(root.keys)} rows of document_keys in mode {mode}"
    for stage in ("ingest", "score"):
        batches = {row["batch_id"] for row in root.rejects if row["stage"].startswith(stage)}
        assert batches == {0, 1}, f"micro-batches of {stage} with rejects: {batches}"


def _log(number: int, outcome: Outcome) -> None:
    kills = ", ".join(f"{kill.kind} at {kill.point or kill.stage}" for kill in outcome.trial.kills)
    LOGGER.info("trial %d (%.0f s, from %s): %s", number, outcome.seconds, outcome.trial.start, kills)
    for line in outcome.differences.lines:
        LOGGER.error("trial %d: %s", number, line)


def kills_by_place(found: Results) -> list[dict[str, str | int]]:
    """Delivered kills, a row a place."""
    places = [*PLACES, *(f"{stage} at random" for stage in ("ingest", "score", "refine"))]
    counts = [{kind: found.landed[kind, place] for kind in VICTIMS} for place in places]
    return [{"killed": place, **row, "all": sum(row.values())} for place, row in zip(places, counts, strict=True)]


def missed_points(found: Results) -> list[str]:
    """Fault points with too few kills."""
    return [place for place in PLACES if sum(found.landed[kind, place] for kind in VICTIMS) < LANDINGS]


def report(found: Results, n_trials: int, mode: Mode) -> bool:
    """Prints the tables and writes the ratios; whether all is as it should be."""
    rows = kills_by_place(found)
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    names = ("lost", "duplicated", "differing")
    totals = {name: found.total(name) for name in names}
    kills = sum(found.landed.values())
    restarts = sum(outcome.restarts for outcome in found.outcomes)
    line = [len(found.outcomes), kills, restarts, *totals.values(), f"{found.seconds:.0f}"]
    print(results.table(["trials", "kills", "restarts", *names, "seconds"], [line]))
    # Each mode has its own file, so that the figures of two modes do not replace each other.
    name = "faults" if mode == "document" else f"faults_{mode}"
    results.record(name, {"trials": len(found.outcomes), **totals}, rows, key="kills")
    missed = [
        row["killed"] for row in rows if " at random" not in str(row["killed"]) and int(str(row["all"])) < LANDINGS
    ]
    if n_trials >= TRIALS and missed:
        print(f"expected {LANDINGS} kills at each fault point; fewer at {', '.join(map(str, missed))}")
    return len(found.outcomes) == n_trials and not any(totals.values()) and not (n_trials >= TRIALS and missed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seconds", type=float, default=4500.0, help="no trial is begun after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default="document", help="ingest.chunking.mode of the runs")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = run(plan(arguments.trials, arguments.seed), FOLDER, arguments.seed, arguments.seconds, arguments.mode)
    return 0 if report(found, arguments.trials, arguments.mode) else 1


if __name__ == "__main__":
    sys.exit(main())
