"""How the time of the scorers passes: in a scorer, or between two slices; and the line about it in the log.

    teacher: 1,234,567 tokens, 170,123 tokens/s, 0.54 of the peak (989 TFLOP/s), waited 0.3 % of the time, 31.2 of
    139.8 GiB

Input: calls of scorers and the tokens that they report. Output: seconds in `ScoreCounts`, and a line for each model ten
seconds after its start and then every minute. Asks the scorer object for FLOPs and memory. Executor side, in a scorer
process or in the Spark worker; begins again with each task. Loads neither torch nor pyspark.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from miniplm_udf.scoring.usage import ScorerUsage
from miniplm_udf.workers.score_counts import ScoreCounts

LOGGER = logging.getLogger("miniplm.workers")

# The first line comes early: it shows at once that a model works, and how fast.
_FIRST_LINE_SECONDS = 10.0
_LINE_EVERY_SECONDS = 60.0
_GIB = 2**30


class Clock:
    """Separates time in scorers from time outside them, after the first slice.

    Attributes:
        steady: whether the first slice is done.
        waited_seconds: time outside scorers since then.
    """

    def __init__(self) -> None:
        self.steady = False
        self.waited_seconds = 0.0
        self._busy_seconds = 0.0
        self._idle_since: float | None = None
        self._busy_since: float | None = None

    def reset(self) -> None:
        """Called after a model was loaded: the time of loading does not count as waiting."""
        self._idle_since = None

    def busy_seconds(self, now: float) -> float:
        """Returns the time in scorers after the first slice.

        Args:
            now: the time until which a call that runs counts.
        """
        return self._busy_seconds + (0.0 if self._busy_since is None else now - self._busy_since)

    @contextlib.contextmanager
    def working(self, alias: str, counts: ScoreCounts) -> Iterator[float]:
        """Counts the time that a scorer works, and the time since the last slice. Gives the time of the start.

        The time of a call that raises counts too.

        Args:
            alias: the model's alias.
            counts: gets the times.
        """
        start, self._busy_since = time.monotonic(), None
        if self.steady and self._idle_since is not None:
            self._busy_since = start
            self.waited_seconds += start - self._idle_since
            counts.waited_seconds += start - self._idle_since
        try:
            yield start
        finally:
            self._idle_since = time.monotonic()
            seconds = self._idle_since - start
            counts.of(alias).seconds += seconds
            if self._busy_since is not None:
                self._busy_seconds += seconds
                counts.busy_seconds += seconds
                self._busy_since = None


@dataclasses.dataclass(frozen=True)
class WorkDone:
    """The work of a model since its task began, or since an earlier state.

    Attributes:
        tokens: scored tokens.
        seconds: time in the model's scorer.
        busy_seconds: time in the scorers of all models, without the first slice.
        waited_seconds: time outside all scorers, without the first slice.
        model_flops: model FLOPs; None if they are not known.
    """

    tokens: int
    seconds: float
    busy_seconds: float
    waited_seconds: float
    model_flops: float | None

    def since(self, other: "WorkDone") -> "WorkDone":
        """Returns the difference.

        Args:
            other: an earlier state.
        """
        has_flops = self.model_flops is not None and other.model_flops is not None
        return WorkDone(
            self.tokens - other.tokens,
            self.seconds - other.seconds,
            self.busy_seconds - other.busy_seconds,
            self.waited_seconds - other.waited_seconds,
            (self.model_flops or 0.0) - (other.model_flops or 0.0) if has_flops else None,
        )


def log_line(alias: str, tokens: int, latest: WorkDone, usage: ScorerUsage | None) -> str:
    """Returns the line about a model; what is not known is left out.

    Args:
        alias: the model's alias.
        tokens: scored tokens of the task.
        latest: what was done since the last line.
        usage: the state of the scorer; None if it does not say.
    """
    seconds = max(latest.seconds, 1e-9)
    parts = [f"{tokens:,} tokens", f"{latest.tokens / seconds:,.0f} tokens/s"]
    if usage is not None and usage.peak_flops_per_second and latest.model_flops is not None:
        share = latest.model_flops / seconds / usage.peak_flops_per_second
        parts.append(f"{share:.2f} of the peak ({usage.peak_flops_per_second / 1e12:,.0f} TFLOP/s)")
    steady = latest.busy_seconds + latest.waited_seconds
    if steady > 0:
        parts.append(f"waited {100 * latest.waited_seconds / steady:.1f} % of the time")
    if usage is not None and usage.memory_bytes is not None:
        total = "" if usage.memory_total_bytes is None else f" of {usage.memory_total_bytes / _GIB:.1f}"
        parts.append(f"{usage.memory_bytes / _GIB:.1f}{total} GiB")
    return f"{alias}: {', '.join(parts)}"


class Meter:
    """Logs the rate of a model every minute, and counts the time of its scorer.

    Args:
        alias: the model's alias.
        clock: the clock of all models of the call.
        progressed: called after each step of the scorer; may raise.
    """

    def __init__(self, alias: str, clock: Clock, progressed: Callable[[], None]) -> None:
        self._alias, self._clock, self._progressed = alias, clock, progressed
        self._scorer: Any = None
        self._tokens, self._seconds = 0, 0.0
        self._since = time.monotonic()
        self._next_line = self._since + _FIRST_LINE_SECONDS
        self._logged: WorkDone | None = None

    @contextlib.contextmanager
    def working(self, scorer: Any, counts: ScoreCounts) -> Iterator[None]:
        """Measures a call of the scorer, which runs in the block, also if it raises.

        Args:
            scorer: the scorer; its `on_progress` is set if it has this attribute.
            counts: gets the seconds of the block and the token budget that the scorer found, for the model's alias.
        """
        self._scorer = scorer
        if hasattr(scorer, "on_progress"):
            scorer.on_progress = self._add
        with self._clock.working(self._alias, counts) as self._since:
            if self._logged is None:
                self._logged = self._work_done(self._since, self._usage())
            try:
                yield
            finally:
                self._seconds += time.monotonic() - self._since
        usage = self._usage()
        if usage is not None and usage.found_tokens_per_batch is not None:
            counts.of(self._alias).tokens_per_batch[usage.place] = usage.found_tokens_per_batch

    def _usage(self) -> ScorerUsage | None:
        usage: ScorerUsage | None = self._scorer.usage() if hasattr(self._scorer, "usage") else None
        return usage

    def _work_done(self, now: float, usage: ScorerUsage | None) -> WorkDone:
        """The state in the middle of a call of the scorer."""
        return WorkDone(
            self._tokens,
            self._seconds + now - self._since,
            self._clock.busy_seconds(now),
            self._clock.waited_seconds,
            None if usage is None else usage.model_flops,
        )

    def _add(self, tokens: int) -> None:
        self._progressed()
        self._tokens += tokens
        now = time.monotonic()
        # A generator reports its tokens after a batch, and 0 in each step before.
        if not self._tokens or now < self._next_line or self._logged is None:
            return
        self._next_line = now + _LINE_EVERY_SECONDS
        usage = self._usage()
        done = self._work_done(now, usage)
        LOGGER.info("%s", log_line(self._alias, self._tokens, done.since(self._logged), usage))
        self._logged = done
