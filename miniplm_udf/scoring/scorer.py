"""Scores texts with a causal language model: sums of -log p in nats, token and byte counts. Pure torch, no Spark.

Owns batches, the forward pass and the handling of a batch that does not fit in memory (`text_scorer` owns the way from
texts to windows and back). Input: the windows of a slice; output: their nats. Never holds logits of batch x time x
vocabulary (`head`). Executor side (and the trainer's evaluation). Deterministic up to rounding: in float32 without
compilation a retry gives the same numbers to about 1e-6. Eager and compiled code round differently, and which batches
run compiled differs from run to run, so in bfloat16 a retry may differ by as much as bfloat16 itself rounds.
"""

import logging
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from miniplm_udf.scoring import compilation
from miniplm_udf.scoring.batch_size import SearchResult, find_tokens_per_batch, place_of
from miniplm_udf.scoring.batching import length_limit
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.device_maps import is_split
from miniplm_udf.scoring.head import Head
from miniplm_udf.scoring.memory import free_memory, is_out_of_memory, memory_in_use
from miniplm_udf.scoring.model_flops import model_sizes
from miniplm_udf.scoring.peaks import peak_flops_per_second
from miniplm_udf.scoring.results import Failure
from miniplm_udf.scoring.text_scorer import Slice, TextScorer, WindowInput
from miniplm_udf.scoring.usage import ScorerUsage
from miniplm_udf.scoring.windows import batches

LOGGER = logging.getLogger("miniplm.scorer")

# Measured (make bench-score): on a CPU the activations of a batch should fit the cache. A GPU's size is searched.
_CPU_TOKENS_PER_BATCH = 1024
# Tokens that are scored in the time that a pass takes whatever its size. On a CPU measured: SmolLM2-135M on two cores,
# 2 x 128 tokens in 434 ms, 8 x 128 in 1,517 ms. On a GPU not measured: 3 ms at 170,000 tokens/s.
_CPU_PASS_TOKENS, _GPU_PASS_TOKENS = 50, 512
# A model of 70B parameters has 0.7 GiB of activations for so many tokens; `device_maps` leaves 1 GiB free on each GPU.
_SPLIT_TOKENS_PER_BATCH = 4096


class Scorer(TextScorer):
    """A loaded model that scores texts; `tokens_per_batch` is the token budget of one forward pass."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        description: ModelDescription,
        tokens_per_batch: int | None = None,
        device: str | torch.device = "cpu",
        compiled: bool | None = None,
        workers_per_gpu: int = 1,
        attention: str = "auto",
    ) -> None:
        """Prepares a loaded model for scoring.

        Args:
            model: a model that is on `device` already (`models.load_model`).
            tokenizer: the model's tokenizer (`load_tokenizer`).
            description: the model's description.
            tokens_per_batch: token budget of one forward pass; None searches the best one on a GPU, which takes some
                seconds, and takes 1,024 on a CPU.
            device: a torch device.
            compiled: whether to use `torch.compile`; None uses it on a GPU. A split model is never compiled.
            workers_per_gpu: processes that share the GPU.
            attention: `score.attention`, with which the model was loaded; a part of the name of the place.

        Raises:
            ModelLoadError: the model's scores would depend on the batch (`length_limit`), or it has no output layer.
        """
        self._device = torch.device(device)
        self._place = place_of(self._device, description.dtype, workers_per_gpu, attention)
        self._sizes, self._model_flops = model_sizes(model), 0.0
        spread = is_split(model)
        # The GPUs of a split model work one after the other, so the peak of one GPU says nothing. The search would
        # measure the memory of the first GPU only.
        self._peak = None if spread else peak_flops_per_second(self._device, description.dtype)
        # Two windows spread the attention heads evenly over the cores: measured, 5 % at 1,024 tokens a window.
        self._at_least = 2 if tokens_per_batch is None and self._device.type == "cpu" else 1
        self._pass_tokens = _CPU_PASS_TOKENS if self._device.type == "cpu" else _GPU_PASS_TOKENS
        self._length_limit = length_limit(model, description.longest_input_tokens)
        self._head = Head(model)
        # Before the model is compiled: a compilation would take far longer than the search.
        if tokens_per_batch is None and (spread or self._device.type == "cpu"):
            tokens_per_batch = _SPLIT_TOKENS_PER_BATCH if spread else _CPU_TOKENS_PER_BATCH
        self._found_tokens: int | None = None
        if tokens_per_batch is None:
            result = self._search_tokens_per_batch(description, workers_per_gpu)
            tokens_per_batch = result.tokens
            self._found_tokens = tokens_per_batch if result.is_general else None
        super().__init__(tokenizer, description, tokens_per_batch)
        self._fitting_tokens = tokens_per_batch
        # One window of the longest length: a smaller budget would not make the largest pass smaller.
        self._least_tokens = min(tokens_per_batch, description.longest_input_tokens)
        # The hooks that move a split model's tensors between its GPUs cannot be compiled into one graph.
        if not spread and (compiled if compiled is not None else self._device.type == "cuda"):
            self._head.compile()

    def usage(self) -> ScorerUsage:
        """Returns the state of the scorer, for the log and for the model's record on the driver."""
        memory = memory_in_use(self._device) or (None, None)
        flops = None if self._sizes.has_experts else self._model_flops
        return ScorerUsage(self._place, self._found_tokens, flops, self._peak, *memory)

    def _search_tokens_per_batch(self, description: ModelDescription, workers_per_gpu: int) -> SearchResult:
        """Searches the token budget with passes over windows of the longest length, which score all positions."""
        length, ids = description.longest_input_tokens, np.random.default_rng(0)

        def run_pass(n_windows: int) -> None:
            input_BT = ids.integers(0, description.vocab_size, (n_windows, length), dtype=np.int64)
            self._nll(input_BT, input_BT, np.ones(input_BT.shape, dtype=bool))

        return find_tokens_per_batch(description.model_id, run_pass, length, self._device, workers_per_gpu)

    def finish_compiling(self) -> bool:
        """See `TextScorer.finish_compiling`."""
        return compilation.finish_compiling()

    def score_windows(self, jobs: list[WindowInput], texts: Slice) -> None:
        """Adds the nats of each window to the sum of its text; a window that does not fit in memory fails its text.

        Args:
            jobs: the windows of the slice.
            texts: the slice.
        """
        budget = min(self.tokens_per_batch, self._fitting_tokens)
        for indices in batches(
            [len(job) for job in jobs], budget, self._pass_tokens, self._at_least, self._length_limit
        ):
            self._score_batch([jobs[index] for index in indices], texts)

    def _score_batch(self, jobs: list[WindowInput], texts: Slice, is_part: bool = False) -> None:
        """Adds the sums of a batch. Halves a batch that does not fit in memory; a single window then fails its text.

        Args:
            jobs: the windows of the batch.
            texts: the slice.
            is_part: whether the batch is a part of one that did not fit.
        """
        # Skips the remaining windows of a text that failed in an earlier batch.
        jobs = [job for job in jobs if texts.failures[job.text] is None]
        if not jobs:
            return
        out_of_memory: str | None = None
        try:
            nll, n_scored = self._forward(jobs, texts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = str(error) or type(error).__name__
        if out_of_memory is None:
            np.add.at(texts.sums, [job.text for job in jobs], nll)
            self._model_flops += self._sizes.forward_flops([len(job) for job in jobs], n_scored)
            if self.on_progress is not None:
                self.on_progress(n_scored)
            return
        # Outside the except block: the traceback would keep the tensors of the failed pass.
        free_memory(self._device)
        if len(jobs) == 1:
            detail = f"a window of {len(jobs[0])} tokens does not fit in memory: {out_of_memory[:500]}"
            texts.failures[jobs[0].text] = Failure("out_of_memory", detail)
            return
        half = len(jobs) // 2
        if not is_part:
            self._use_smaller_batches(len(jobs), (len(jobs) - half) * max(len(job) for job in jobs))
        self._score_batch(jobs[:half], texts, is_part=True)
        self._score_batch(jobs[half:], texts, is_part=True)

    def _use_smaller_batches(self, n_windows: int, tokens: int) -> None:
        """Makes later slices take batches of half the size of one that did not fit."""
        self._at_least = 1
        self._fitting_tokens = min(self._fitting_tokens, max(tokens, self._least_tokens))
        LOGGER.warning(
            "a batch of %d windows does not fit in memory: halved; batches of %d tokens from the next slice on",
            n_windows, self._fitting_tokens,
        )  # fmt: skip

    def _forward(self, jobs: list[WindowInput], texts: Slice) -> tuple[np.ndarray, int]:
        """Runs one forward pass; returns the nats of each window (float64) and the number of scored predictions."""
        n_rows, longest = len(jobs), max(len(job) for job in jobs)
        input_BT = np.zeros((n_rows, longest), dtype=np.int64)
        target_BT = np.zeros((n_rows, longest), dtype=np.int64)
        scored_BT = np.zeros((n_rows, longest), dtype=bool)
        for row, job in enumerate(jobs):
            item, window, start, end = texts.input_of(job), job.window, len(job.in_front), len(job)
            input_BT[row, :start] = job.in_front
            input_BT[row, start:end] = item.ids[window.start : window.end]
            target_BT[row, start:end] = item.ids[window.start + 1 : window.end + 1]
            first = start + window.first_scored - window.start
            scored_BT[row, first:end] = item.scored[window.first_scored : window.end]
        row_N = scored_BT.nonzero()[0]
        nll_N = self._nll(input_BT, target_BT, scored_BT)
        return np.bincount(row_N, weights=nll_N, minlength=n_rows), len(row_N)

    @torch.inference_mode()
    def _nll(self, input_BT: np.ndarray, target_BT: np.ndarray, scored_BT: np.ndarray) -> np.ndarray:
        """The nats of the scored positions, row by row: float64, shape (N,). Waits for the device."""
        hidden_BTD = self._head.hidden(torch.from_numpy(input_BT).to(self._device))
        hidden_ND = hidden_BTD[torch.from_numpy(scored_BT).to(hidden_BTD.device)]
        target_N = torch.from_numpy(target_BT[scored_BT]).to(hidden_BTD.device)
        return self._head.nll(hidden_ND, target_N).double().cpu().numpy()
