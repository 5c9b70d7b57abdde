"""The counts that workers make while they score; Spark brings them to the driver in an accumulator, not in the rows.

Input: one `ScoreCounts` for each task, sent when the task has finished (a task that fails sends nothing). Output: their
sum on the driver. It serves summaries and logs, and gives rejects their reasons; only the tables say which rows are
rejected. Pure data, used on the driver and on executors; loads nothing heavy.
"""

import dataclasses

# Failed rows that are carried to the driver in one micro-batch; rejects beyond that get the reason not_scored.
MAX_FAILED = 100_000

# instance_id, model_id, reason, detail
FailedRow = tuple[str, str, str, str | None]


@dataclasses.dataclass
class ModelCounts:
    """Counts of the texts that one model scored.

    Attributes:
        n_scored: texts with a score.
        n_failed: texts without a score.
        n_tokens: scored tokens.
        seconds: time that workers spent in the scorer, without loading the model.
        tokens_per_batch: the smallest token budget of a forward pass that a worker's search found, by place
            (`batch_size.place_of`).
    """

    n_scored: int = 0
    n_failed: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    tokens_per_batch: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, other: "ModelCounts") -> None:
        """Adds other counts to these.

        Args:
            other: the counts to add; they stay as they are.
        """
        self.n_scored += other.n_scored
        self.n_failed += other.n_failed
        self.n_tokens += other.n_tokens
        self.seconds += other.seconds
        for place, tokens in other.tokens_per_batch.items():
            # The smallest: searches on GPUs of one kind may end at neighbouring sizes.
            self.tokens_per_batch[place] = min(tokens, self.tokens_per_batch.get(place, tokens))

    @property
    def tokens_per_second(self) -> float | None:
        """Scored tokens per second of time in the scorer; None if no token or no time was counted."""
        return round(self.n_tokens / self.seconds, 2) if self.n_tokens and self.seconds > 0 else None


@dataclasses.dataclass
class ScoreCounts:
    """Counts by alias, the failed rows with their reasons, and how the models' time passed.

    Attributes:
        models: counts by alias.
        failed: failed rows, at most MAX_FAILED.
        busy_seconds: time in scorers, without each task's first slice.
        waited_seconds: time between two slices in which no scorer worked: waiting for input, or for the results to be
            read; without loading models.
    """

    models: dict[str, ModelCounts] = dataclasses.field(default_factory=dict)
    failed: list[FailedRow] = dataclasses.field(default_factory=list)
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0

    def of(self, alias: str) -> ModelCounts:
        """Returns the counts of a model, and adds counts of 0 for a model that has none yet.

        Args:
            alias: the model's alias.
        """
        return self.models.setdefault(alias, ModelCounts())

    def add(self, other: "ScoreCounts") -> None:
        """Adds other counts to these; drops failed rows beyond MAX_FAILED.

        Args:
            other: the counts to add; they stay as they are.
        """
        for alias, counts in other.models.items():
            self.of(alias).add(counts)
        self.failed.extend(other.failed[: MAX_FAILED - len(self.failed)])
        self.busy_seconds += other.busy_seconds
        self.waited_seconds += other.waited_seconds

    @property
    def wait_share(self) -> float | None:
        """The share of time in which no model worked, without each task's first slice; None if no task had another."""
        steady = self.busy_seconds + self.waited_seconds
        return round(self.waited_seconds / steady, 4) if steady > 0 else None


class ScoreCountsParam:
    """Tells Spark's accumulator how to add `ScoreCounts` (pyspark's `AccumulatorParam`, by its methods)."""

    def zero(self, value: ScoreCounts) -> ScoreCounts:
        """Returns empty counts, with which an accumulator starts; Spark passes its first `value`, which is not used."""
        return ScoreCounts()

    def addInPlace(self, value: ScoreCounts, other: ScoreCounts) -> ScoreCounts:
        """Adds `other` to `value` and returns `value`."""
        value.add(other)
        return value
