"""A fake scorer that can end its process, and a log that tells what was made and scored where.

Its own module, and a light one: a scorer process that is started for a test imports this alone.
"""

import dataclasses
import importlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from miniplm_udf.errors import ConfigError
from miniplm_udf.scoring.results import Score


class CrashingScorer:
    """Its score is a function of the text; some words end the process, or take their time."""

    slice_bytes = 100

    def __init__(self, factor: float, log: Path) -> None:
        self.factor, self.log = factor, log
        self.on_progress: Callable[[int], None] | None = None

    def score(self, texts: Sequence[str | None], *_: Any) -> list[Score]:
        return [self._score(str(text)) for text in texts]

    def _score(self, text: str) -> Score:
        if "kill" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        for word, times in (("once", 1), ("twice", 2)):
            if word in text and deaths(self.log) < times:
                write(self.log, "dies")
                os.kill(os.getpid(), signal.SIGSEGV)
        if "cuda" in text:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if "slow" in text:
            time.sleep(0.1)
        write(self.log, f"scored {text}")
        assert self.on_progress is not None
        self.on_progress(1)
        return Score(self.factor * sum(text.encode()), len(text), len(text.encode()))


def write(log: Path, line: str) -> None:
    with log.open("a") as handle:
        handle.write(line + "\n")


@dataclasses.dataclass(frozen=True)
class CrashingFactory:
    """Makes a `CrashingScorer`; `loading` says what happens then: die, die once, or an error's name."""

    factor: float
    log: Path
    loading: str = ""

    @property
    def key(self) -> str:
        return f"{self.factor}/{self.log}"

    def __call__(self) -> CrashingScorer:
        write(self.log, f"made {self.factor} {os.getpid()}")
        mark = self.log.with_suffix(".loaded")
        if self.loading == "die" or (self.loading == "die once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.loading == "ConfigError":
            raise ConfigError("context_tokens: too many")
        if self.loading == "ValueError":
            raise ValueError("no weights")
        return CrashingScorer(self.factor, self.log)


def made(log: Path) -> list[tuple[float, int]]:
    """The factor and the process id of each scorer that was made."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(float(line.split()[1]), int(line.split()[2])) for line in lines if line.startswith("made")]


def pids(log: Path) -> list[int]:
    return [pid for _, pid in made(log)]


def deaths(log: Path) -> int:
    return log.read_text().splitlines().count("dies")


def scored(log: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines() if line.startswith("scored")]


class Unloadable:
    """A factory that no process can unpickle."""

    key = "unloadable"

    def __call__(self) -> Any: ...

    def __reduce__(self) -> Any:
        return importlib.import_module, ("no_such_module",)
