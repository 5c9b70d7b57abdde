"""Runs fault trials on a real cluster: one master, two workers with pretended GPUs, two drivers.

Inputs: the trials (`trials.plan`) and a folder. Output: `Results`, what each trial differed in from an undisturbed run
and which kills were delivered where. Keeps all logs in the folder. `tests.faults.run` prints and judges the results.
"""

import collections
import dataclasses
import logging
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.faults import experiment
from tests.support.faults.check import Root, read_root
from tests.support.faults.drivers import REPOSITORY, DriverPool
from tests.support.faults.experiment import Mode
from tests.support.faults.points import POINTS
from tests.support.faults.roots import copy_root
from tests.support.faults.trials import Outcome, Trial, TrialBench, run_trial
from tests.support.standalone import StandaloneCluster

LOGGER = logging.getLogger("miniplm.faults")

# The kills that sixty trials deliver at each fault point, at least.
LANDINGS = 10
TRIALS = 60
PLACES = [f"{stage} {name}" for stage, names in POINTS.items() for name in names]
_RUN_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of all trials. `landed` are the delivered kills by (kind, place)."""

    outcomes: list[Outcome]
    landed: collections.Counter[tuple[str, str]]
    seconds: float

    def total(self, name: str) -> int:
        return sum(getattr(outcome.differences, name) for outcome in self.outcomes)


def run(
    trials: Sequence[Trial], folder: Path, seed: int, seconds: float, mode: Mode, roots: str | None = None
) -> Results:
    """Runs the trials, as many as can be begun in the time.

    Args:
        folder: emptied first; keeps all logs, and the roots of the trials that found something.
        seconds: from the start of the cluster on.
        mode: of chunking.
        roots: URI of the folder of all roots on S3, whose server this process reaches; None: in `folder`.
    """
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    outcomes: list[Outcome] = []
    # GPUs to spare: an executor that is dying and the one in its place have one each, for two drivers.
    with StandaloneCluster(folder / "cluster", workers=2, cores=8, gpus=6) as cluster:
        conf = {**cluster.driver_conf(), **_credentials(), "spark.executorEnv.PYTHONPATH": str(REPOSITORY)}
        roots = roots or str(folder)
        with DriverPool(cluster.url, conf, roots, folder) as drivers:
            bench = prepare(cluster, drivers, folder, roots, random.Random(seed), mode)
            LOGGER.info("prepared in %.0f s", time.monotonic() - start)
            for number, trial in enumerate(trials):
                if time.monotonic() - start > seconds:
                    LOGGER.warning("the time is up after %d of %d trials", number, len(trials))
                    break
                outcomes.append(run_trial(bench, trial, number))
                _log(number, outcomes[-1])
    return Results(outcomes, bench.landed, time.monotonic() - start)


def _credentials() -> dict[str, str]:
    """The cluster's daemons have none of this process's variables, so the session gives them to the executors."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {f"spark.executorEnv.{name}": os.environ[name] for name in names if name in os.environ}


def prepare(
    cluster: StandaloneCluster, drivers: DriverPool, folder: Path, roots: str, chosen: random.Random, mode: Mode
) -> TrialBench:
    """Runs the experiment undisturbed, and keeps what it had left before each stage."""
    experiment.write_input(folder / "input")
    seconds: dict[str, float] = {}
    ingested, whole = f"{roots}/ingested", f"{roots}/whole"
    _undisturbed(drivers, folder, ingested, ["ingest"], mode, seconds)
    copy_root(ingested, whole)
    _undisturbed(drivers, folder, whole, ["score", "refine"], mode, seconds)
    expected = read_root(whole)
    _check_is_worth_it(expected, mode)
    prepared = {
        "ingest": None,
        "score": ingested,
        "matrix": _without(whole, f"{roots}/scored", "_checkpoints/score_matrix-*", "tables/score_matrix/*"),
        "refine": _without(whole, f"{roots}/in-matrix"),
    }
    return TrialBench(cluster, drivers, roots, folder / "input", mode, prepared, expected, seconds, chosen)


def _without(whole: str, copy: str, *patterns: str) -> str:
    """A copy of a root without its refined corpora, and without the files that fit the patterns."""
    copy_root(whole, copy, without=(*patterns, "tables/refined/*", "tables/corpora/*"))
    return copy


def _undisturbed(
    drivers: DriverPool, folder: Path, root: str, stages: list[str], mode: Mode, seconds: dict[str, float]
) -> None:
    """Runs stages to their end, and notes how long each took."""
    driver = drivers.current()
    command = {"root": root, "input": str(folder / "input"), "stages": stages, "mode": mode}
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
