"""Scores texts with a causal language model: sums of -log p in nats, token and byte counts. Pure torch, no Spark.

Owns slices, batches, the forward pass and the handling of a batch that does not fit in memory. Input: texts with their
segment ends; output: a `Score` or a `Failure` for each, in input order. Never holds logits of batch x time x vocabulary
(`head`), nor token ids of more than one slice of texts. Executor side (and the trainer's evaluation). Deterministic up
to floating-point addition: a retry gives the same numbers to about 1e-6.

Source: MiniPLM, arXiv 2410.17215, section 3; nll_sum_nats = - sum over scored i of log p(ids[i + 1] | ids[: i + 1]).
"""

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from miniplm_udf.scoring.batching import length_limit
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.head import Head
from miniplm_udf.scoring.inputs import EncodedText, TextEncoder, TextTokenizer, Tokenized
from miniplm_udf.scoring.memory import is_out_of_memory
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.scoring.windows import Window, batches, windows

LOGGER = logging.getLogger("miniplm.scorer")

# Measured (make bench-score): on a CPU the activations of a batch should fit the cache; a GPU needs many rows at once.
_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 32768}
# A slice of texts, which is tokenized and sorted by length, fills this many batches: enough for batches of similar
# lengths, few enough that memory does not grow with the corpus and results come steadily.
_BATCHES_PER_SLICE = 16
_BYTES_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class _WindowInput:
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


class Scorer:
    """A loaded model that scores texts.

    Attributes:
        tokenizer_hash: scorers with equal hashes can use each other's `tokenize` results.
        tokens_per_batch: token budget of one forward pass.
        slice_bytes: UTF-8 bytes of text that make one call of `score` worthwhile.
        on_progress: called after each forward pass with the number of tokens that it scored.
        warnings: warnings of the load, for people.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        description: ModelDescription,
        tokens_per_batch: int | None = None,
        device: str | torch.device = "cpu",
        compiled: bool | None = None,
    ) -> None:
        """Prepares a loaded model for scoring.

        Args:
            model: a model that is on `device` already (`models.load_model`).
            tokenizer: the model's tokenizer (`load_tokenizer`).
            description: the model's description.
            tokens_per_batch: token budget of one forward pass; None takes the best value for the device.
            device: a torch device.
            compiled: whether to use `torch.compile`; None uses it on a GPU.

        Raises:
            ModelLoadError: the model's scores would depend on the batch (`length_limit`), or it has no output layer.
        """
        self._device = torch.device(device)
        # Two windows spread the attention heads evenly over the cores: measured, 5 % at 1,024 tokens a window.
        self._at_least = 2 if tokens_per_batch is None and self._device.type == "cpu" else 1
        if tokens_per_batch is None:
            tokens_per_batch = _TOKENS_PER_BATCH.get(self._device.type, _TOKENS_PER_BATCH["cuda"])
        self.description = description
        self.on_progress: Callable[[int], None] | None = None
        self.warnings: list[str] = []
        self.slice_bytes = _BATCHES_PER_SLICE * _BYTES_PER_TOKEN * tokens_per_batch
        self.tokens_per_batch = self._fitting_tokens = tokens_per_batch
        self._length_limit = length_limit(model, description.longest_input_tokens)
        self._head = Head(model)
        if compiled if compiled is not None else self._device.type == "cuda":
            self._head.compile()
        self.tokenizer_hash = description.tokenizer_hash
        self._tokenizer = TextTokenizer(tokenizer)
        self._encoder = TextEncoder(self._tokenizer, description)

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
            out_of_memory.
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
            _WindowInput(text, window, self._encoder.in_front(window))
            for text, item in enumerate(encoded)
            if isinstance(item, EncodedText)
            for window in self._windows(item)
        ]
        sums = np.zeros(len(encoded), dtype=np.float64)
        results: list[Score | Failure | None] = [item if isinstance(item, Failure) else None for item in encoded]
        budget = min(self.tokens_per_batch, self._fitting_tokens)
        for indices in batches([len(job) for job in jobs], budget, self._at_least, self._length_limit):
            self._score_batch([jobs[index] for index in indices], encoded, sums, results)
        return [
            result if result is not None else _finished(item, float(total))
            for result, item, total in zip(results, encoded, sums, strict=True)
        ]

    def _windows(self, item: EncodedText) -> Iterator[Window]:
        """The windows of a text with a scored prediction."""
        context, overlap = (
            self.description.context_tokens,
            self.description.window_overlap_tokens,
        )
        for window in windows(len(item.ids) - 1, context, overlap):
            if item.scored[window.first_scored : window.end].any():
                yield window

    def _score_batch(
        self,
        jobs: list[_WindowInput],
        encoded: list[EncodedText | Failure],
        sums: np.ndarray,
        results: list[Score | Failure | None],
    ) -> None:
        """Adds the sums of a batch. Halves a batch that does not fit in memory; a single window then fails its text."""
        # Skips the remaining windows of a text that failed in an earlier batch.
        jobs = [job for job in jobs if results[job.text] is None]
        if not jobs:
            return
        out_of_memory: str | None = None
        try:
            nll, n_scored = self._forward(jobs, encoded)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = str(error) or type(error).__name__
        if out_of_memory is None:
            np.add.at(sums, [job.text for job in jobs], nll)
            if self.on_progress is not None:
                self.on_progress(n_scored)
            return
        # Outside the except block: the traceback would keep the tensors of the failed pass.
        self._free_memory()
        if len(jobs) == 1:
            detail = f"a window of {len(jobs[0])} tokens does not fit in memory: {out_of_memory[:500]}"
            results[jobs[0].text] = Failure("out_of_memory", detail)
            return
        half, self._at_least = len(jobs) // 2, 1
        # Smaller batches from now on, so that later slices do not fail and get halved again.
        self._fitting_tokens = min(self._fitting_tokens, (len(jobs) - half) * max(len(job) for job in jobs))
        LOGGER.warning(
            "a batch of %d windows does not fit in memory: halved; batches of %d tokens from the next slice on",
            len(jobs), self._fitting_tokens,
        )  # fmt: skip
        self._score_batch(jobs[:half], encoded, sums, results)
        self._score_batch(jobs[half:], encoded, sums, results)

    @torch.inference_mode()
    def _forward(self, jobs: list[_WindowInput], encoded: list[EncodedText | Failure]) -> tuple[np.ndarray, int]:
        """Runs one forward pass; returns the nats of each window (float64) and the number of scored predictions."""
        n_rows, longest = len(jobs), max(len(job) for job in jobs)
        input_BT = np.zeros((n_rows, longest), dtype=np.int64)
        target_BT = np.zeros((n_rows, longest), dtype=np.int64)
        scored_BT = np.zeros((n_rows, longest), dtype=bool)
        for row, job in enumerate(jobs):
            item, window, start, end = encoded[job.text], job.window, len(job.in_front), len(job)
            assert isinstance(item, EncodedText)
            input_BT[row, :start] = job.in_front
            input_BT[row, start:end] = item.ids[window.start : window.end]
            target_BT[row, start:end] = item.ids[window.start + 1 : window.end + 1]
            first = start + window.first_scored - window.start
            scored_BT[row, first:end] = item.scored[window.first_scored : window.end]
        row_N = scored_BT.nonzero()[0]
        hidden_BTD = self._head.hidden(torch.from_numpy(input_BT).to(self._device))
        hidden_ND = hidden_BTD[torch.from_numpy(scored_BT).to(self._device)]
        target_N = torch.from_numpy(target_BT[scored_BT]).to(self._device)
        nll_N = self._head.nll(hidden_ND, target_N).double().cpu().numpy()
        return np.bincount(row_N, weights=nll_N, minlength=n_rows), len(row_N)

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _finished(item: EncodedText | Failure, total: float) -> Score | Failure:
    assert isinstance(item, EncodedText)
    n_tokens = int(item.scored.sum())
    if not math.isfinite(total):
        return Failure("nan_score", f"expected a finite sum over {n_tokens} tokens, found {total}")
    return Score(total, n_tokens, item.n_bytes)
