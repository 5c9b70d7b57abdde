"""Driver processes as the harness holds them: one at work, and a spare that is started, so that a restart is quick.

Owns the processes of `tests.support.faults.driver` and their pipes. A driver is killed with its whole process group,
Python and JVM at once, as when its machine dies. A spare knows only what is on disk of the run that it takes over.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.faults.points import Point
from tests.support.standalone import die_with_parent

REPOSITORY = Path(__file__).resolve().parents[3]
START_SECONDS = 120.0


class DriverLost(Exception):
    """The driver ended, or said nothing for too long, without having been killed by us."""


class Driver:
    """One driver process.

    Args:
        master: of its session.
        conf: of its session.
        root: a place on the storage of the roots that it will work on.
        log: takes what Spark and Python say.
    """

    def __init__(self, master: str, conf: Mapping[str, str], root: str, log: Path) -> None:
        self.log, self.app_id = log, ""
        given = json.dumps({"root": root, "spark": {"master": master, "conf": dict(conf)}})
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.faults.driver", given],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, cwd=REPOSITORY, text=True,
                start_new_session=True, preexec_fn=die_with_parent,
                env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"},
            )  # fmt: skip
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def wait_until_ready(self) -> None:
        if not self.app_id:
            self.app_id = self.event(START_SECONDS)["app_id"]

    def send(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def event(self, seconds: float) -> dict[str, Any]:
        """The next event.

        Raises:
            queue.Empty: none came in time.
            DriverLost: the process has ended.
        """
        found = self._events.get(timeout=max(seconds, 0.0))
        if found is None:
            raise DriverLost(f"{self.log}: the driver ended by itself:\n{self.log.read_text(errors='replace')[-3000:]}")
        return found

    def wait_for(self, name: str, seconds: float) -> dict[str, Any]:
        """The next event of a name; earlier events are dropped.

        Raises:
            DriverLost: the run failed, or the process has ended.
        """
        while (found := self.event(seconds))["event"] != name:
            if found["event"] == "failed":
                raise DriverLost(f"{self.log}: {found['error']}")
        return found

    def has_news(self) -> bool:
        """Whether there is an event that nobody has taken yet."""
        return not self._events.empty()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> bool:
        """Kills Python and JVM at once; returns whether the process was running, and the kill ended it."""
        if not self.is_alive:
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait() == -signal.SIGKILL


def release(next_stop: Point | None) -> dict[str, Any]:
    """The answer to "stopped"."""
    return {"stop": dataclasses.asdict(next_stop) if next_stop else None}


class DriverPool:
    """Always a driver at hand. A `with` block around it ends them all."""

    def __init__(self, master: str, conf: Mapping[str, str], root: str, folder: Path) -> None:
        self._master, self._conf, self._root, self._folder = master, conf, root, folder
        self._n_started = 0
        self._current = self._start()
        self._spare = self._start()

    def __enter__(self) -> "DriverPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for driver in (self._current, self._spare):
            driver.kill()

    def _start(self) -> Driver:
        self._n_started += 1
        return Driver(self._master, self._conf, self._root, self._folder / f"driver-{self._n_started}.log")

    def current(self) -> Driver:
        """The driver at work. One that is dead is replaced by the spare, and a new spare is started."""
        if not self._current.is_alive:
            self._current, self._spare = self._spare, self._start()
        self._current.wait_until_ready()
        return self._current
