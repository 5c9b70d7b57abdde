"""The scorers that a process keeps across tasks.

Input: factories by alias. Output: scorers, made when they are first used and kept, so that a process loads a model
once, and a meter for each. Knows no columns. Executor side, in a scorer process or in
the Spark worker; a retried task finds the scorers that its process kept, or makes them again. Loads neither torch nor
pyspark.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from miniplm_udf import errors
from miniplm_udf.workers.meter import Clock, Meter

# Bytes of text in one call of a scorer that has no `slice_bytes` of its own.
_SLICE_BYTES = 1024 * 1024
# Scorers of this process, by their factory's key.
_KEPT: dict[str, "KeptScorer"] = {}


class ScorerLike(Protocol):
    """An object that scores texts: `scoring.scorer.Scorer`, or a fake in a test.

    It may have `slice_bytes` (bytes of text that make one call worthwhile), `on_progress` (set by `Meter`, to be called
    with numbers of scored tokens) and `usage` (returns a `ScorerUsage`). A result has nll_sum_nats, n_tokens and
    n_bytes, or reason and detail.
    """

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> Sequence[Any]:
        """Scores texts.

        Args:
            texts: the instances' texts, None where a row has none.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.
            ends_document: whether the text ends at a document's end, for each text.

        Returns:
            One result per text, in their order.
        """


@runtime_checkable
class TokenizingScorer(ScorerLike, Protocol):
    """A scorer that tokenizes in a call of its own: in a thread, and once for all scorers with one `tokenizer_hash`."""

    tokenizer_hash: str

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> Sequence[Any]:
        """Tokenizes texts.

        Args:
            texts: the instances' texts, None where a row has none.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.

        Returns:
            One entry per text, which only scorers with the same `tokenizer_hash` can read.
        """

    def score_tokenized(self, tokenized: Sequence[Any], ends_document: Sequence[bool]) -> Sequence[Any]:
        """Scores tokenized texts.

        Args:
            tokenized: entries that `tokenize` returned.
            ends_document: whether the text ends at a document's end, for each entry.

        Returns:
            One result per entry, in their order.
        """


@runtime_checkable
class TextGenerator(Protocol):
    """A model that continues texts: `scoring.generator.Generator`, or a fake in a test.

    It may have `slice_bytes` and `on_progress`, as a `ScorerLike`. A result has the columns of GENERATED_SCHEMA between
    the alias and the reason, or reason and detail.
    """

    tokenizer_hash: str

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> Sequence[Any]:
        """Tokenizes texts.

        Args:
            texts: the instances' texts, None where a row has none.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.

        Returns:
            One entry per text.
        """

    def generate(self, tokenized: Sequence[Any], ends_document: Sequence[bool], ids: Sequence[str]) -> Sequence[Any]:
        """Continues tokenized texts.

        Args:
            tokenized: entries that `tokenize` returned.
            ends_document: whether the text ends at a document's end, for each entry.
            ids: id of the instance, for each entry.

        Returns:
            One result per entry, in their order.
        """


WorkerScorer = ScorerLike | TextGenerator


@dataclasses.dataclass
class KeptScorer:
    """A scorer, and the number of texts in a row that it has raised an error for."""

    scorer: WorkerScorer
    errors_in_a_row: int = 0


class WorkerScorers:
    """The scorers of one call, made in the main thread when they are first used, and a meter for each.

    Args:
        factories: callables that make the scorers, by alias.
    """

    def __init__(self, factories: Mapping[str, Callable[[], WorkerScorer]]) -> None:
        self._factories = factories
        self._own: dict[str, KeptScorer] = {}
        self._meters: dict[str, Meter] = {}
        self._clock = Clock()

    def progressed(self) -> None:
        """Called while a scorer works, after each of its steps. May raise, which stops the scorer."""

    def slice_done(self) -> None:
        """Called after all models have scored a slice. From the second slice on, times count as the steady state."""
        self._clock.steady = True

    def get(self, alias: str) -> KeptScorer:
        """Returns the scorer of an alias, and makes it if this process has none yet. Call it in the main thread.

        Args:
            alias: the model's alias.

        Raises:
            ScoringError: there is no factory for the alias.
        """
        if alias not in self._factories:
            raise errors.ScoringError(
                f"model_ids: expected aliases of {sorted(self._factories)}, found {alias!r}; "
                f"give score_arrow its factory"
            )
        scorers, name = self._entry(alias)
        if name not in scorers:
            self._drop_unneeded()
            scorers[name] = KeptScorer(self._factories[alias]())
            self._clock.reset()
        return scorers[name]

    def existing(self, alias: str) -> WorkerScorer | None:
        """Returns the scorer of an alias without making it, so that the reading thread may call this.

        Args:
            alias: the model's alias.

        Returns:
            The scorer; None if it is not made yet, or the alias has no factory.
        """
        if alias not in self._factories:
            return None
        scorers, name = self._entry(alias)
        return scorers[name].scorer if name in scorers else None

    def slice_bytes(self) -> int:
        """UTF-8 bytes of text in one call: the largest number that a scorer asks for."""
        sizes = [getattr(self.existing(alias), "slice_bytes", None) for alias in self._factories]
        return max([int(size) for size in sizes if size is not None], default=_SLICE_BYTES)

    def meter(self, alias: str) -> Meter:
        """The meter of an `alias`, made at the first call."""
        return self._meters.setdefault(alias, Meter(alias, self._clock, self.progressed))

    def _entry(self, alias: str) -> tuple[dict[str, KeptScorer], str]:
        """The dictionary that holds the scorer of an alias, and its key there."""
        key = getattr(self._factories[alias], "key", None)
        return (self._own, alias) if key is None else (_KEPT, str(key))

    def _drop_unneeded(self) -> None:
        """Frees the models that this call does not use."""
        needed = {getattr(factory, "key", None) for factory in self._factories.values()}
        for key in [key for key in _KEPT if key not in needed]:
            del _KEPT[key]
