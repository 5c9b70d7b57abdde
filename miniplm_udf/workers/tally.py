"""What workers count while they score, and how Spark brings it to the driver: an accumulator, not columns of each row.

Input: one `Tally` a task, sent when the task has finished (a failed try sends nothing). Output: their sum on the
driver. For summaries and logs, and for the reasons of rejects; which rows are rejected is told by the tables alone.
Pure data, used on the driver and on executors; loads nothing heavy.
"""

import dataclasses

# Reasons and details that are carried over the driver in one micro-batch; rejects beyond are written as not_scored.
MAX_FAILED = 100_000

# instance_id, model_id, reason, detail
Failed = tuple[str, str, str, str | None]


@dataclasses.dataclass
class ModelCounts:
    """What was scored with one model. `seconds` are those that workers spent in the scorer, loading aside."""

    n_scored: int = 0
    n_failed: int = 0
    n_tokens: int = 0
    seconds: float = 0.0

    def add(self, other: "ModelCounts") -> None:
        self.n_scored += other.n_scored
        self.n_failed += other.n_failed
        self.n_tokens += other.n_tokens
        self.seconds += other.seconds

    @property
    def tokens_per_second(self) -> float | None:
        return round(self.n_tokens / self.seconds, 2) if self.n_tokens and self.seconds > 0 else None


@dataclasses.dataclass
class Tally:
    """Counts by alias, failures with their reasons, and how the models' time passed.

    Attributes:
        busy_seconds: spent in scorers, each task's first slice aside.
        waited_seconds: between two slices, in none: waiting for input, or for the results to be taken; loading aside.
    """

    models: dict[str, ModelCounts] = dataclasses.field(default_factory=dict)
    failed: list[Failed] = dataclasses.field(default_factory=list)
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0

    def of(self, alias: str) -> ModelCounts:
        return self.models.setdefault(alias, ModelCounts())

    def add(self, other: "Tally") -> None:
        for alias, counts in other.models.items():
            self.of(alias).add(counts)
        self.failed.extend(other.failed[: MAX_FAILED - len(self.failed)])
        self.busy_seconds += other.busy_seconds
        self.waited_seconds += other.waited_seconds

    @property
    def wait_share(self) -> float | None:
        """The share of the time in which no model worked, in the steady state; None where a task had one slice only."""
        steady = self.busy_seconds + self.waited_seconds
        return round(self.waited_seconds / steady, 4) if steady > 0 else None


class TallyParam:
    """How Spark's accumulator adds tallies (pyspark's `AccumulatorParam`, by its methods)."""

    def zero(self, value: Tally) -> Tally:
        return Tally()

    def addInPlace(self, value: Tally, other: Tally) -> Tally:
        value.add(other)
        return value
