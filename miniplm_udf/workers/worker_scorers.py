"""The scorers that a process keeps, and how their time passes: in a scorer, or between two of its slices.

Input: factories by alias. Output: scorers, made at their first use and kept across tasks, so that a model is loaded
once a process; seconds and rates in a `Tally` and the log. Knows nothing of columns. Executor side, in a scorer process
or in the Spark worker; a retried task finds the scorers that its process kept, or makes them again. Loads neither torch
nor pyspark.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from miniplm_udf import errors
from miniplm_udf.workers.tally import Tally

LOGGER = logging.getLogger("miniplm.udf")

# Text handed to a scorer at once, where the scorer has no `slice_bytes` of its own.
_SLICE_BYTES = 1024 * 1024
_LOG_EVERY_SECONDS = 10.0
# Scorers of this process, by their factory's key.
_KEPT: dict[str, "Kept"] = {}


class ScorerLike(Protocol):
    """What scores texts: `scoring.scorer.Scorer`, or a fake in a test.

    May have `slice_bytes` (text that is worth handing over at once) and `on_progress` (set by us, called with counts of
    scored tokens). A result has nll_sum_nats, n_tokens and n_bytes, or reason and detail.
    """

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> Sequence[Any]: ...


@runtime_checkable
class TokenizingScorer(ScorerLike, Protocol):
    """A scorer whose tokenizing is apart: done ahead in a thread, and once for all scorers of a `tokenizer_hash`."""

    tokenizer_hash: str

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> Sequence[Any]: ...

    def score_tokenized(self, tokenized: Sequence[Any], ends_document: Sequence[bool]) -> Sequence[Any]: ...


@dataclasses.dataclass
class Kept:
    """A scorer, and how many texts in a row it has raised on."""

    scorer: ScorerLike
    errors_in_a_row: int = 0


class WorkerScorers:
    """The scorers of one call, made at their first use in the main thread, and a meter each.

    Args:
        factories: makers of scorers, by alias.
    """

    def __init__(self, factories: Mapping[str, Callable[[], ScorerLike]]) -> None:
        self._factories = factories
        self._own: dict[str, Kept] = {}
        self._meters: dict[str, Meter] = {}
        self._clock = _Clock()

    def progressed(self) -> None:
        """Called while a scorer works, after each of its steps. May raise, to have it stop."""

    def slice_done(self) -> None:
        """After all models had their turn at a slice: from the second on, it is the steady state."""
        self._clock.steady = True

    def get(self, alias: str) -> Kept:
        """The scorer of an alias; makes it where it is not there."""
        if alias not in self._factories:
            raise errors.ScoringError(
                f"model_ids: expected aliases of {sorted(self._factories)}, found {alias!r}; "
                f"give score_arrow its factory"
            )
        kept, name = self._place(alias)
        if name not in kept:
            self._make_room()
            kept[name] = Kept(self._factories[alias]())
            self._clock.reset()
        return kept[name]

    def made(self, alias: str) -> ScorerLike | None:
        """The scorer, where it is made already. For the reading thread: it makes none."""
        if alias not in self._factories:
            return None
        kept, name = self._place(alias)
        return kept[name].scorer if name in kept else None

    def slice_bytes(self) -> int:
        """Text that is worth handing over at once: the most that a scorer asks for."""
        found = [getattr(self.made(alias), "slice_bytes", None) for alias in self._factories]
        return max([int(size) for size in found if size is not None], default=_SLICE_BYTES)

    def meter(self, alias: str) -> "Meter":
        return self._meters.setdefault(alias, Meter(alias, self._clock, self.progressed))

    def _place(self, alias: str) -> tuple[dict[str, Kept], str]:
        key = getattr(self._factories[alias], "key", None)
        return (self._own, alias) if key is None else (_KEPT, str(key))

    def _make_room(self) -> None:
        """Lets go of models that this call has no use for."""
        wanted = {getattr(factory, "key", None) for factory in self._factories.values()}
        for key in [key for key in _KEPT if key not in wanted]:
            del _KEPT[key]


class _Clock:
    """Tells time in scorers from time in none, once a first slice is through."""

    def __init__(self) -> None:
        self.steady = False
        self._idle_since: float | None = None

    def reset(self) -> None:
        """After a model was loaded: what that took, and its first slice, is not of the steady state."""
        self._idle_since = None

    @contextlib.contextmanager
    def working(self, alias: str, counts: Tally) -> Iterator[float]:
        """Counts a scorer's time, and that since the slice before. Gives the time of the start."""
        start, idle_since = time.monotonic(), self._idle_since
        yield start
        self._idle_since = time.monotonic()
        seconds = self._idle_since - start
        counts.of(alias).seconds += seconds
        if self.steady and idle_since is not None:
            counts.waited_seconds += start - idle_since
            counts.busy_seconds += seconds


class Meter:
    """Logs a model's tokens per second of its own work, every ten seconds."""

    def __init__(self, alias: str, clock: _Clock, progressed: Callable[[], None]) -> None:
        self._alias, self._clock, self._progressed = alias, clock, progressed
        self._tokens, self._seconds = 0, 0.0
        self._since = self._logged = time.monotonic()

    @contextlib.contextmanager
    def working(self, scorer: ScorerLike, counts: Tally) -> Iterator[None]:
        """Around each call of the scorer; `counts` takes the seconds."""
        if hasattr(scorer, "on_progress"):
            scorer.on_progress = self._add
        with self._clock.working(self._alias, counts) as self._since:
            yield
        self._seconds += time.monotonic() - self._since

    def _add(self, tokens: int) -> None:
        self._progressed()
        self._tokens += tokens
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = now
            seconds = self._seconds + now - self._since
            LOGGER.info("%s: %d tokens, %.0f tokens/s", self._alias, self._tokens, self._tokens / max(seconds, 1e-9))
