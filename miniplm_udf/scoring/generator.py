"""Continues texts with a causal language model, for SeqKD: the model generates the ids after a text's beginning.

Owns the prompt, the noise of sampling, the end of a continuation, and the handling of a batch that does not fit in
memory. Forward passes, cache, temperature and top-p are transformers' `generate`. Input: tokenized texts with
their ids; output: a `Generation` or a `Failure` for each, in input order. Executor side. A continuation depends on the
seed, the id of its instance, the model and the settings: not on its batch, except for the rounding of sums. All prompts
have the same number of tokens, so no batch has padding in front. A retry gives the same tokens.

    a text of the model's tokens:   t0 t1 t2 t3 t4 t5 t6         prompt_tokens = 4, new_tokens = 2
    its generation:                 t0 t1 t2 t3 g4 g5            g: from the model

Source: SeqKD as arXiv 2410.17215 uses it: the first 768 tokens of each instance are the prompt, the teacher generates
the rest of 1,024. Axes: B rows, T tokens, V vocabulary.
"""

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.scoring.batching import length_limit
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.inputs import TextTokenizer, Tokenized
from miniplm_udf.scoring.memory import is_out_of_memory
from miniplm_udf.scoring.results import Failure, Generation

LOGGER = logging.getLogger("miniplm.generator")

# Tokens of prompts and continuations in one batch. Not measured on a GPU: a starting value, halved if it does not fit.
_TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
_BATCHES_PER_SLICE = 4
_BYTES_PER_TOKEN = 4
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Generator:
    """A loaded model that continues texts.

    Attributes:
        tokenizer_hash: objects with equal hashes can use each other's `tokenize` results.
        slice_bytes: UTF-8 bytes of text that make one call of `generate` worthwhile.
        on_progress: called in each step of a batch with 0, and after the batch with the number of new tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        description: ModelDescription,
        settings: GenerateConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        """Prepares a loaded model.

        Args:
            model: a model that is on `device` already (`models.load_model`); its own generation config is replaced.
            tokenizer: the model's tokenizer (`load_tokenizer`).
            description: the model's description.
            settings: lengths, sampling, seed and the token budget of a batch.
            device: a torch device.

        Raises:
            ModelLoadError: what the model predicts would depend on the texts before (`length_limit`).
        """
        self._model, self._settings, self._description = model, settings, description
        self._device = torch.device(device)
        self._in_front = [] if description.bos_token_id is None else [description.bos_token_id]
        length = len(self._in_front) + settings.prompt_tokens + settings.new_tokens
        length_limit(model, length)
        budget = settings.tokens_per_batch or _TOKENS_PER_BATCH.get(self._device.type, _TOKENS_PER_BATCH["cuda"])
        self._rows_per_batch = max(1, budget // length)
        self.slice_bytes = _BATCHES_PER_SLICE * self._rows_per_batch * settings.prompt_tokens * _BYTES_PER_TOKEN
        self.on_progress: Callable[[int], None] | None = None
        self.tokenizer_hash = description.tokenizer_hash
        self._tokenizer = TextTokenizer(tokenizer)
        known = set(tokenizer.get_vocab(with_added_tokens=True).values())
        # Spare rows of the embedding have no text, so no student's tokenizer has them.
        self._unknown_ids = sorted(set(range(description.vocab_size)) - known)
        model.generation_config = self._generation_config()

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Tokenized | Failure]:
        """Tokenizes texts: the part that needs no model and may run in another thread.

        Args:
            texts: the instances' texts.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.

        Returns:
            The first argument of `generate`.
        """
        return self._tokenizer.tokenize(texts, segment_ends)

    def generate(
        self, tokenized: Sequence[Tokenized | Failure], ends_document: Sequence[bool], ids: Sequence[str]
    ) -> list[Generation | Failure]:
        """Continues the beginnings of texts.

        Args:
            tokenized: the result of `tokenize`.
            ends_document: whether the text ends at a document's end, for each text.
            ids: id of the instance, for each text.

        Returns:
            One result for each text, in order. A text of no more than `prompt_tokens` tokens is returned as it is, with
            the end reason `prompt`. Reasons of failures: no_tokens, nan_logits, tokenizer_failed, out_of_memory.
        """
        results: list[Generation | Failure | None] = []
        prompts: dict[int, np.ndarray] = {}
        for row, (item, ends) in enumerate(zip(tokenized, ends_document, strict=True)):
            token_ids = self._token_ids(item, ends)
            if isinstance(token_ids, Failure):
                results.append(token_ids)
            elif len(token_ids) <= self._settings.prompt_tokens:
                results.append(Generation(_to_bytes(token_ids), len(token_ids), "prompt"))
            else:
                prompts[row] = token_ids[: self._settings.prompt_tokens]
                results.append(None)
        rows = list(prompts)
        start = 0
        while start < len(rows):
            # Read again for each batch: a batch that did not fit makes later batches smaller.
            batch = rows[start : start + self._rows_per_batch]
            start += len(batch)
            self._continue(batch, prompts, ids, results)
        return [result for result in results if result is not None]

    def _token_ids(self, item: Tokenized | Failure, ends_document: bool) -> np.ndarray | Failure:
        """The ids of a text, with the separator after each document that ends in it; no BOS."""
        if isinstance(item, Failure):
            return item
        separator = np.array([self._description.document_separator_id], dtype=np.int32)
        parts: list[np.ndarray] = []
        for number, segment in enumerate(item.segments):
            parts += [piece.ids for piece in segment]
            if number < len(item.segments) - 1 or ends_document:
                parts.append(separator)
        if not any(item.segments):
            return Failure("no_tokens", "expected a text with tokens, found none")
        token_ids = np.concatenate(parts)
        if int(token_ids.max()) >= self._description.vocab_size:
            return Failure(
                "tokenizer_failed",
                f"token id {token_ids.max()} is outside the model's {self._description.vocab_size} ids",
            )
        return token_ids

    def _continue(
        self, rows: list[int], prompts: dict[int, np.ndarray], ids: Sequence[str],
        results: list[Generation | Failure | None],
    ) -> None:  # fmt: skip
        """Fills in the results of a batch. Halves a batch that does not fit in memory; a single row then fails."""
        out_of_memory: str | None = None
        try:
            continued = self._forward([prompts[row] for row in rows], [ids[row] for row in rows])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = str(error) or type(error).__name__
        if out_of_memory is None:
            for row, result in zip(rows, continued, strict=True):
                results[row] = result
            if self.on_progress is not None:
                self.on_progress(sum(result.n_tokens for result in continued if isinstance(result, Generation)))
            return
        # Outside the except block: the traceback would keep the tensors of the failed pass.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(rows) == 1:
            results[rows[0]] = Failure("out_of_memory", f"one row does not fit in memory: {out_of_memory[:500]}")
            return
        half = len(rows) // 2
        self._rows_per_batch = min(self._rows_per_batch, len(rows) - half)
        LOGGER.warning("a batch of %d rows does not fit in memory: halved from now on", len(rows))
        self._continue(rows[:half], prompts, ids, results)
        self._continue(rows[half:], prompts, ids, results)

    @torch.inference_mode()
    def _forward(self, prompts: list[np.ndarray], ids: list[str]) -> list[Generation | Failure]:
        """Continues prompts of equal length."""
        in_front = np.tile(np.array(self._in_front, dtype=np.int64), (len(prompts), 1))
        input_BT = torch.from_numpy(np.concatenate([in_front, np.stack(prompts).astype(np.int64)], axis=1))
        watch = _Watch(input_BT.shape[1], self._description.document_separator_id, self.on_progress)
        input_BT = input_BT.to(self._device)
        output_BT = self._model.generate(
            input_BT,
            attention_mask=torch.ones_like(input_BT),
            logits_processor=self._processors(watch, [row_seed(self._settings.seed, name) for name in ids]),
        )
        new_BT = output_BT[:, input_BT.shape[1] :].cpu().numpy()
        return [
            Failure("nan_logits", "expected finite logits for each next token, found NaN")
            if is_bad
            else self._finished(prompt, new)
            for prompt, new, is_bad in zip(prompts, new_BT, watch.is_bad_B.tolist(), strict=True)
        ]

    def _finished(self, prompt: np.ndarray, new: np.ndarray) -> Generation:
        """The prompt and the new ids up to the first separator, which belongs to the text; padding follows it."""
        ends = np.flatnonzero(new == self._description.document_separator_id)
        new = new[: ends[0] + 1] if len(ends) else new
        return Generation(_to_bytes(np.concatenate([prompt, new])), len(prompt), "eos" if len(ends) else "length")

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        separator = self._description.document_separator_id
        return GenerationConfig(
            do_sample=False, max_new_tokens=self._settings.new_tokens, eos_token_id=separator, pad_token_id=separator
        )

    def _processors(self, watch: "_Watch", seeds: list[int]) -> Any:
        """The processors of each step's logits: transformers' own, then noise, so that the largest logit is a draw."""
        from transformers import (
            LogitsProcessorList,
            SuppressTokensLogitsProcessor,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        settings, processors = self._settings, LogitsProcessorList([watch])
        if self._unknown_ids:
            processors.append(SuppressTokensLogitsProcessor(self._unknown_ids, device=str(self._device)))
        if settings.temperature > 0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
            processors.append(_GumbelNoise(watch.n_prompt, seeds))
        return processors


def _to_bytes(token_ids: np.ndarray) -> bytes:
    return token_ids.astype("<i4").tobytes()


class _Watch:
    """Marks rows with a NaN among their logits before their end, and reports progress. Changes nothing.

    Args:
        n_prompt: tokens of each prompt, with the BOS.
        separator_id: the token that ends a row.
        on_progress: called with 0 in each step; may raise, which stops the batch.
    """

    def __init__(self, n_prompt: int, separator_id: int, on_progress: Callable[[int], None] | None) -> None:
        self.n_prompt, self._separator_id, self._on_progress = n_prompt, separator_id, on_progress
        self.is_bad_B: torch.Tensor = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_nan_B = scores.isnan().any(dim=-1)
        if input_ids.shape[1] == self.n_prompt:
            self.is_bad_B = is_nan_B
        else:
            is_finished_B = (input_ids[:, self.n_prompt :] == self._separator_id).any(dim=-1)
            self.is_bad_B = self.is_bad_B | (is_nan_B & ~is_finished_B)
        if self._on_progress is not None:
            self._on_progress(0)
        return scores


class _GumbelNoise:
    """Adds noise to logits, so that the token with the largest sum is a draw from their softmax (Gumbel-max).

    `generate` draws the tokens of all rows from one generator of random numbers, so a row's tokens would depend on its
    batch. Here each row has its own numbers: a function of its seed, the step and the token, the same on all devices.

    Args:
        n_prompt: tokens of each prompt, with the BOS.
        seeds: 64 bits for each row (`row_seed`).
    """

    def __init__(self, n_prompt: int, seeds: list[int]) -> None:
        self._n_prompt, self._seeds = n_prompt, torch.tensor([_signed(seed) for seed in seeds])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, n_vocab = input_ids.shape[1] - self._n_prompt, scores.shape[-1]
        first = step * n_vocab + 1
        counter_V = torch.arange(first, first + n_vocab, device=scores.device)
        uniform_BV = uniform(self._seeds.to(scores.device)[:, None], counter_V[None, :])
        return scores.double() - torch.log(-torch.log(uniform_BV))


def row_seed(seed: int, instance_id: str) -> int:
    """Returns 64 bits from which all random numbers of a row are made.

    Args:
        seed: `generate.seed`.
        instance_id: id of the instance.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{instance_id}".encode()).digest()[:8], "big")


def uniform(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Random numbers above 0 and below 1: output number `counter` of the generator SplitMix64 with this `seed`.

    Only integer arithmetic modulo 2^64, so that a GPU gives the same numbers as a CPU.

    Args:
        seed: int64.
        counter: int64, from 1, of a shape that broadcasts with `seed`.

    Returns:
        float64 of the common shape: multiples of 2^-52, plus 2^-53. One bit more would round the largest to 1.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    """
    state = seed + counter * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 12).double() + 0.5) * 2.0**-52


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The values as unsigned 64-bit numbers, shifted right; torch's own shift would repeat the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (1 << 64) if number >= 1 << 63 else number
