"""Scores texts window by window: from texts to windows, from windows to scores. Knows no model and no torch.

Owns slices of texts, the sums over the windows of a text, and the results in input order. `scorer.Scorer` computes the
windows with a model in this process, `server_scorer.ServerScorer` asks a server. Input: texts with their segment ends;
output: a `Score` or a `Failure` for each. Never holds token ids of more than one slice of texts. Executor side (and the
trainer's evaluation).

Source: MiniPLM, arXiv 2410.17215, section 3; nll_sum_nats = - sum over scored i of log p(ids[i + 1] | ids[: i + 1]).
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.inputs import EncodedText, TextEncoder, TextTokenizer, Tokenized
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.scoring.windows import Window, windows

# Enough for batches of similar lengths, few enough that memory does not grow with the corpus and results come steadily.
_BATCHES_PER_SLICE = 16
_BYTES_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class WindowInput:
    """One window of one text of a slice.

    Attributes:
        text: number of the text in the slice.
        window: the window.
        in_front: ids in front of the window's input; context that predicts nothing.
    """

    text: int
    window: Window
    in_front: list[int]

    def __len__(self) -> int:
        return len(self.in_front) + len(self.window)


@dataclasses.dataclass
class Slice:
    """The texts of one slice while they are scored.

    Attributes:
        encoded: the input of the model for each text, or why it has none.
        sums: nats of each text so far, float64, shape (texts,).
        failures: the failure of each text; None while it has none.
    """

    encoded: list[EncodedText | Failure]
    sums: np.ndarray
    failures: list[Failure | None]

    def input_of(self, job: WindowInput) -> EncodedText:
        """Returns the input of the text that a window belongs to.

        Args:
            job: a window of this slice.
        """
        item = self.encoded[job.text]
        assert isinstance(item, EncodedText)
        return item

    def results(self) -> list[Score | Failure]:
        """Returns the result of each text, once all windows are scored."""
        return [
            failure if failure is not None else _finished(item, float(total))
            for failure, item, total in zip(self.failures, self.encoded, self.sums, strict=True)
        ]


class TextScorer(abc.ABC):
    """Scores texts; a subclass scores the windows.

    Attributes:
        tokenizer_hash: scorers with equal hashes can use each other's `tokenize` results.
        tokens_per_batch: tokens that are scored at the same time.
        slice_bytes: UTF-8 bytes of text that make one call of `score` worthwhile.
        on_progress: called with numbers of scored tokens, as they are scored.
        warnings: warnings of the load, for people.

    Args:
        tokenizer: the model's tokenizer (`load_tokenizer`).
        description: the model's description.
        tokens_per_batch: tokens that are scored at the same time.
        batches_per_slice: batches in a slice of texts, which is tokenized and sorted by length as a whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        description: ModelDescription,
        tokens_per_batch: int,
        batches_per_slice: int = _BATCHES_PER_SLICE,
    ) -> None:
        self.description = description
        self.on_progress: Callable[[int], None] | None = None
        self.warnings: list[str] = []
        self.tokens_per_batch = tokens_per_batch
        self.slice_bytes = batches_per_slice * _BYTES_PER_TOKEN * tokens_per_batch
        self.tokenizer_hash = description.tokenizer_hash
        self._tokenizer = TextTokenizer(tokenizer)
        self._encoder = TextEncoder(self._tokenizer, description)

    @abc.abstractmethod
    def score_windows(self, jobs: list[WindowInput], texts: Slice) -> None:
        """Adds the nats of each window to the sum of its text, or sets the text's failure.

        Args:
            jobs: the windows with a scored prediction of all texts of the slice, in order.
            texts: the slice.
        """

    def finish_compiling(self) -> bool:
        """Waits until nothing is compiled in the background any more; for measurements and tests.

        Returns:
            Whether a compilation has begun since the last call. Score a batch again in this case: it may have layers of
            another kind, whose compilation begins then.
        """
        return False

    def score(
        self,
        texts: Sequence[str | None],
        segment_ends: Sequence[Sequence[int]],
        ends_document: Sequence[bool],
    ) -> list[Score | Failure]:
        """Scores texts.

        Args:
            texts: the instances' texts.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.
            ends_document: whether the text ends at a document's end, for each text.

        Returns:
            One result for each text, in order. Reasons of failures: no_tokens, nan_score, tokenizer_failed,
            out_of_memory (a model in this process), bad_answer (a server).
        """
        results: list[Score | Failure] = []
        # One slice at a time, so that the ids of a whole corpus are never in memory.
        for start, end in self._slices([len(text or "") for text in texts]):
            tokenized = self.tokenize(texts[start:end], segment_ends[start:end])
            results.extend(self._score_slice(tokenized, ends_document[start:end]))
        return results

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Tokenized | Failure]:
        """Tokenizes texts: the part of `score` that needs no model and may run in another thread.

        Args:
            texts: see `score`.
            segment_ends: see `score`.

        Returns:
            The argument of `score_tokenized`, of this or any scorer with the same `tokenizer_hash`.
        """
        return self._tokenizer.tokenize(texts, segment_ends)

    def score_tokenized(
        self, tokenized: Sequence[Tokenized | Failure], ends_document: Sequence[bool]
    ) -> list[Score | Failure]:
        """Scores tokenized texts: the part of `score` that needs the model.

        Args:
            tokenized: the result of `tokenize`.
            ends_document: see `score`.

        Returns:
            As `score`.
        """
        results: list[Score | Failure] = []
        for start, end in self._slices([item.n_bytes if isinstance(item, Tokenized) else 0 for item in tokenized]):
            results.extend(self._score_slice(tokenized[start:end], ends_document[start:end]))
        return results

    def _slices(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Ranges of consecutive texts with about `slice_bytes` together."""
        start, size = 0, 0
        for end, n_bytes in enumerate(sizes, start=1):
            size += n_bytes
            if size >= self.slice_bytes or end == len(sizes):
                yield start, end
                start, size = end, 0

    def _score_slice(
        self, tokenized: Sequence[Tokenized | Failure], ends_document: Sequence[bool]
    ) -> list[Score | Failure]:
        encoded = [self._encoder.encode(*row) for row in zip(tokenized, ends_document, strict=True)]
        jobs = [
            WindowInput(text, window, self._encoder.in_front(window))
            for text, item in enumerate(encoded)
            if isinstance(item, EncodedText)
            for window in self._windows(item)
        ]
        failures = [item if isinstance(item, Failure) else None for item in encoded]
        texts = Slice(encoded, np.zeros(len(encoded), dtype=np.float64), failures)
        self.score_windows(jobs, texts)
        return texts.results()

    def _windows(self, item: EncodedText) -> Iterator[Window]:
        """The windows of a text with a scored prediction."""
        context, overlap = (
            self.description.context_tokens,
            self.description.window_overlap_tokens,
        )
        for window in windows(len(item.ids) - 1, context, overlap):
            if item.scored[window.first_scored : window.end].any():
                yield window


def _finished(item: EncodedText | Failure, total: float) -> Score | Failure:
    assert isinstance(item, EncodedText)
    n_tokens = int(item.scored.sum())
    if not math.isfinite(total):
        return Failure("nan_score", f"expected a finite sum over {n_tokens} tokens, found {total}")
    return Score(total, n_tokens, item.n_bytes)
