"""Trials: what is killed when, and one trial from a fresh root to the comparison with an undisturbed run.

`plan` makes the trials: a round of six, again and again; each begins at a stage (what comes before is copied from a
prepared root) and runs to the end. Three of a round stop at every fault point of their stages, one kill at each; three
kill once, at a random time. `run_trial` delivers the kills, starts the driver again until it has finished, and
compares. A kill that found nothing to kill does not count: the trial is done again from the beginning.
"""

import collections
import contextlib
import dataclasses
import logging
import queue
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.support.faults.check import Differences, Root, compare, read_root
from tests.support.faults.drivers import Driver, DriverLost, DriverPool, release
from tests.support.faults.experiment import Mode
from tests.support.faults.points import POINTS, Point
from tests.support.faults.roots import copy_root, remove_root
from tests.support.standalone import StandaloneCluster

LOGGER = logging.getLogger("miniplm.faults")

COMMANDS = {
    "ingest": ("ingest", "score", "refine"),
    "score": ("score", "refine"),
    "matrix": ("score", "refine"),
    "refine": ("refine",),
}
# In turn at each point: half of them the driver, which alone loses what is in its memory.
_AT_POINTS = ("driver", "executor", "driver", "python worker", "driver", "worker daemon")
# Where no Python has run on executors yet, or none runs at all.
_AT_POINTS_WITHOUT_PYTHON = ("driver", "executor", "driver", "worker daemon")
# Where models have been at work.
_SCORERS = ("driver", "scorer process")
_AT_RANDOM = ("executor", "python worker", "driver", "worker daemon")
_AT_RANDOM_WITHOUT_PYTHON = ("executor", "driver", "worker daemon")
# Many times what a run takes, for a machine that others use, too.
_RUN_SECONDS = 300.0
_RESTARTS = 10
_ATTEMPTS = 6
_FIND_SECONDS = 5.0
# Share of a stage's usual seconds: a random kill is not aimed at the very end, which it would often miss.
_LATEST = 0.8
# Batches are numbered from 0; "committed" of the last one is never passed.
_LAST_BATCH = {"ingest": 1, "score": 0, "matrix": 1, "refine": 0}


@dataclasses.dataclass(frozen=True)
class Kill:
    """A SIGKILL: at a point, or (None) at a random moment of the stage."""

    kind: str
    stage: str
    point: Point | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run from `start` on, with kills in the order in which a run comes by them.

    Attributes:
        varying: whether a score differs with every call.
        keyed: whether scorers are kept by a key.
    """

    start: str
    varying: bool
    keyed: bool
    kills: tuple[Kill, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a trial. `restarts` counts the driver's restarts, after its own failures too."""

    trial: Trial
    differences: Differences
    restarts: int
    seconds: float


class NotDelivered(Exception):
    """A kill found nothing to kill."""


def plan(n_trials: int, seed: int, kills_a_trial: int | None = None) -> list[Trial]:
    """The trials of a run, the same for the same arguments.

    Args:
        kills_a_trial: so many of a trial's fault points at most, at random; None is all.
    """
    made: list[Trial] = []
    chosen, turns = random.Random(seed), _Turns()
    while len(made) < n_trials:
        for start, stages in (
            ("score", ("score",)),
            ("refine", None),
            ("ingest", ("ingest",)),
            ("score", None),
            ("matrix", ("matrix", "refine")),
            ("ingest", None),
        ):
            if stages is None:
                kills = [Kill(turns.at_random(start), start)]
            else:
                batches = {stage: chosen.randint(0, _LAST_BATCH[stage]) for stage in stages}
                points = [Point(stage, name, batches[stage]) for stage in stages for name in POINTS[stage]]
                some = sorted(chosen.sample(range(len(points)), min(kills_a_trial or len(points), len(points))))
                kills = [Kill(turns.at_point(points[place]), points[place].stage, points[place]) for place in some]
            # Each template of a round in turn with scores that vary, and that do not.
            varying = (len(made) + len(made) // 6) % 2 == 0
            keyed = any(kill.kind == "scorer process" for kill in kills) or chosen.random() < 0.5
            made.append(Trial(start, varying, keyed, tuple(kills)))
    return made[:n_trials]


class _Turns:
    """Whose turn it is to be killed."""

    def __init__(self) -> None:
        # Not the same kind first at every point.
        places = [f"{stage} {name}" for stage, names in POINTS.items() for name in names]
        self._turns = collections.Counter({place: number for number, place in enumerate(places)})

    def at_point(self, point: Point) -> str:
        has_python = point.stage in ("ingest", "score") and str(point) != "score before"
        kinds = _AT_POINTS if has_python else _AT_POINTS_WITHOUT_PYTHON
        return self._turn(str(point), (*kinds, *_SCORERS) if has_python and point.stage == "score" else kinds)

    def at_random(self, stage: str) -> str:
        kinds = {"refine": _AT_RANDOM_WITHOUT_PYTHON, "score": (*_AT_RANDOM, "scorer process")}
        return self._turn(stage, kinds.get(stage, _AT_RANDOM))

    def _turn(self, place: str, kinds: tuple[str, ...]) -> str:
        self._turns[place] += 1
        return kinds[(self._turns[place] - 1) % len(kinds)]


@dataclasses.dataclass
class TrialBench:
    """The cluster and the inputs that trials share.

    Attributes:
        roots: path or URI of the folder of all roots.
        mode: of chunking, in all trials.
        prepared: roots as they are before each stage; None before the first.
        expected: what an undisturbed run leaves.
        seconds: that an undisturbed run takes, by stage.
        landed: delivered kills by (kind, point, or the stage and "random").
    """

    cluster: StandaloneCluster
    drivers: DriverPool
    roots: str
    input: Path
    mode: Mode
    prepared: Mapping[str, str | None]
    expected: Root
    seconds: Mapping[str, float]
    chosen: random.Random
    landed: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)


def run_trial(bench: TrialBench, trial: Trial, number: int) -> Outcome:
    """Runs a trial, again where a kill was not delivered; its root stays where rows are lost, doubled or differ."""
    for attempt in range(_ATTEMPTS):
        start = time.monotonic()
        root = f"{bench.roots}/trial-{number}-{attempt}"
        source = bench.prepared[trial.start]
        if source is not None:
            copy_root(source, root)
        run = _Run(bench, trial, root)
        with contextlib.suppress(NotDelivered):
            restarts = run.to_the_end()
            differences = compare(read_root(root), bench.expected, trial.varying)
            bench.landed.update(run.landed)
            if not differences.lines:
                remove_root(root)
            return Outcome(trial, differences, restarts, time.monotonic() - start)
        remove_root(root)
        LOGGER.info("trial %d: a kill was not delivered; again", number)
    raise RuntimeError(f"trial {number}: no kill was delivered in {_ATTEMPTS} attempts: {trial}")


class _Run:
    """One attempt at a trial. `landed` are the kills that were delivered.

    A random kill counts in its own stage alone: once the run has told of the next one, it is too late.
    """

    def __init__(self, bench: TrialBench, trial: Trial, root: str) -> None:
        self._bench, self._trial = bench, trial
        self._command = {
            "root": root, "input": str(bench.input), "stages": COMMANDS[trial.start],
            "mode": bench.mode,            "varying": trial.varying, "keyed": trial.keyed,
        }  # fmt: skip
        self._left = list(trial.kills)
        self._missed: list[Kill] = []
        self._restarts = 0
        self.landed: collections.Counter[tuple[str, str]] = collections.Counter()

    def to_the_end(self) -> int:
        """Kills, and starts the driver again, until a run has finished. Returns the number of restarts.

        Raises:
            NotDelivered: a kill came too late.
        """
        while not self._runs_through(self._bench.drivers.current(), time.monotonic() + _RUN_SECONDS):
            self._restarts += 1
            if self._restarts > _RESTARTS:
                raise RuntimeError(f"no end of {self._trial} in {_RESTARTS} starts of the driver")
        if self._left or self._missed:
            raise NotDelivered
        return self._restarts

    def _runs_through(self, driver: Driver, deadline: float) -> bool:
        """One start of the driver, until a moment of the monotonic clock: whether it came to its end."""
        driver.send({**self._command, **release(self._next_stop())})
        while True:
            try:
                event = driver.event(deadline - time.monotonic())
            except queue.Empty:
                raise RuntimeError(f"{driver.log}: no end of {self._trial} in {_RUN_SECONDS:.0f} s") from None
            if event["event"] == "done":
                return True
            if event["event"] == "failed":
                if not self.landed:
                    raise DriverLost(f"{driver.log}: failed without a kill: {event['error']}")
                LOGGER.info("the run failed after a kill: %s", event["error"].splitlines()[0][:200])
                # As a user would: another process.
                driver.kill()
                return False
            if self._is_due(event):
                self._deliver(driver, event)
                if not driver.is_alive:
                    return False
                if event["event"] == "stopped":
                    driver.send(release(self._next_stop()))

    def _next_stop(self) -> Point | None:
        return self._left[0].point if self._left else None

    def _is_due(self, event: Mapping[str, Any]) -> bool:
        """Whether the next kill is; a random one after a while of its own."""
        if event["event"] == "stopped":
            return True
        if not self._left or self._left[0].point is not None or event["stage"] != self._left[0].stage:
            return False
        time.sleep(self._bench.chosen.uniform(0, _LATEST * self._bench.seconds[event["stage"]]))
        return True

    def _deliver(self, driver: Driver, event: Mapping[str, Any]) -> None:
        """Kills what the next kill names; leaves it in `_missed` where it is not there, or its time is over."""
        kill = self._left.pop(0)
        killed = None
        if not driver.has_news():
            if kill.kind == "driver":
                killed = "driver" if driver.kill() else None
            else:
                # At a point nothing runs: if the driver was just started again, there may be no Python process yet.
                kinds = (kill.kind, "executor") if event["event"] == "stopped" else (kill.kind,)
                killed = self._kill_one(kinds, driver)
        if killed is None:
            self._missed.append(kill)
        else:
            self.landed[killed, str(kill.point) if kill.point else f"{kill.stage} at random"] += 1

    def _kill_one(self, kinds: tuple[str, ...], driver: Driver) -> str | None:
        """Kills a process of the first kind that the driver's application has; a worker daemon is started again."""
        cluster, deadline = self._bench.cluster, time.monotonic() + _FIND_SECONDS
        while time.monotonic() < deadline:
            for kind in kinds:
                found = cluster.processes(kind, None if kind == "worker daemon" else driver.app_id)
                if found:
                    has_died = _kill(self._bench.chosen.choice(found))
                    if kind == "worker daemon":
                        cluster.restart_workers()
                    return kind if has_died else None
            if driver.has_news():
                return None
            time.sleep(0.1)
        return None


def _kill(process: psutil.Process) -> bool:
    """Whether the process was there, and is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        deadline = time.monotonic() + _FIND_SECONDS
        while time.monotonic() < deadline:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.02)
        return False
    return not process.is_running()
