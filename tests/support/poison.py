"""Scorers of real models that some texts break, and functions that end Spark's own workers. Imported on executors."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from miniplm_udf.scoring.results import Score
from miniplm_udf.workers.model_scorers import ModelScorerFactory


class Panic(BaseException):
    """Stands for a panic of the tokenizers library, which Python sees as a BaseException."""


@dataclasses.dataclass(frozen=True)
class PoisonedFactory:
    """Makes a model's scorer that some texts break. `log` has the process of each that was made."""

    inner: ModelScorerFactory
    log: str

    @property
    def key(self) -> str:
        return f"poisoned/{self.inner.key}/{self.log}"

    def __call__(self) -> "PoisonedScorer":
        with Path(self.log).open("a") as handle:
            handle.write(f"{os.getpid()}\n")
        return PoisonedScorer(self.inner())


class PoisonedScorer:
    """A text that begins with `nan`, `panic` or `kill` makes this scorer return NaN, panic or die."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer
        self.tokenizer_hash, self.slice_bytes = scorer.tokenizer_hash, scorer.slice_bytes

    def score(self, texts: Sequence[str | None], segment_ends: Any, ends_document: Sequence[bool]) -> list[Any]:
        return self.score_tokenized(self.tokenize(texts, segment_ends), ends_document)

    def tokenize(self, texts: Sequence[str | None], segment_ends: Any) -> list[Any]:
        if any(str(text).startswith("panic") for text in texts):
            raise Panic("index out of bounds")
        return list(zip(texts, self._scorer.tokenize(texts, segment_ends), strict=True))

    def score_tokenized(self, tokenized: Sequence[Any], ends_document: Sequence[bool]) -> list[Any]:
        if any(str(text).startswith("kill") for text, _ in tokenized):
            os.kill(os.getpid(), signal.SIGKILL)
        results = self._scorer.score_tokenized([item for _, item in tokenized], ends_document)
        return [
            Score(math.nan, 5, 5) if str(text).startswith("nan") else result
            for (text, _), result in zip(tokenized, results, strict=True)
        ]


def dying_once(
    score: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], log: str
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """`score`, in a Spark worker that kills itself in a task's first try, after its first batch came out."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        for batch in score(batches):
            with Path(log).open("a") as handle:
                handle.write(f"{context.attemptNumber()} {os.getpid()}\n")
            if context.attemptNumber() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    return run
