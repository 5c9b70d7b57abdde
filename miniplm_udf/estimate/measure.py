"""Measures on an executor what scoring a sample costs: token counts, model FLOPs, and seconds of real scoring.

Input: one model (`MeasureRequest`), and instances of a sample as record batches. Output: a `Measured`. Owns the
counting and the timing; the scorer is the one of the jobs (`workers.model_scorers`). A model that is not trained yet is
measured with random weights of its architecture: it is as fast, and its scores are thrown away. Runs on executors; the
functions load torch and transformers themselves. A retry measures again.

    FLOPs(training) = 3 FLOPs(forward), as `scoring.flops` counts them
"""

import dataclasses
import itertools
import json
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.flops import forward_flops
from miniplm_udf.storage import Json
from miniplm_udf.workers.messages import SCORE_REQUEST_SCHEMA
from miniplm_udf.workers.model_scorers import ModelScorerFactory, assigned_device
from miniplm_udf.workers.remote import model_errors

LOGGER = logging.getLogger("miniplm.estimate")

REQUEST_SCHEMA = pa.schema([SCORE_REQUEST_SCHEMA.field(name) for name in ("text", "segment_ends", "ends_document")])
_BYTES_PER_TOKEN = 4
_TRAINING_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """The model to measure, and for how long.

    Attributes:
        alias: alias of the model.
        config: the model.
        dtype: dtype that was settled at an earlier scoring; None settles it for the executor.
        score: settings of the scorer.
        seconds: seconds of scoring to aim at, without loading and the first batch.
        architecture: keywords of AutoConfig for a model that is not trained yet; None for an existing model.
        tokenizer: the model whose tokenizer a model that is not trained yet will have.
        train: settings of its training.
        sequence_length: tokens of its training sequences.
    """

    alias: str
    config: ModelConfig
    dtype: str | None
    score: ScoreConfig
    seconds: float
    architecture: Json | None = None
    tokenizer: ModelConfig | None = None
    train: TrainConfig | None = None
    sequence_length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Counts over a whole sample, and rates measured on a part of the sample, for one model.

    Attributes:
        parameters: parameters in the weight files.
        dtype: dtype of the forward pass.
        device: device of the forward pass; `server` for a model on a server.
        scored_tokens: sum of `scores.n_tokens` over the sample.
        forward_tokens: input tokens of all forward passes; more than `scored_tokens` where windows overlap.
        flops: model FLOPs to score the sample.
        rejects: instances that cannot be scored, by reason.
        start_seconds: time to load the model, and the time that its first batch takes longer than later batches. The
            time of compilation is not in it, because a job scores meanwhile, more slowly than at the measured rate.
        tokens_per_second: scored tokens per second after the start.
        timed_tokens: scored tokens that the rate was measured on.
        training_tokens_per_second: rate of an optimiser step; None for an existing model.
        training_flops_per_token: model FLOPs, forward and backward; None for an existing model.
        prefix: what stands in front of each text and why, in words.
        warnings: warnings about the model.
    """

    parameters: int
    dtype: str
    device: str
    scored_tokens: int
    forward_tokens: int
    flops: float
    rejects: dict[str, int]
    start_seconds: float
    tokens_per_second: float
    timed_tokens: int
    training_tokens_per_second: float | None = None
    training_flops_per_token: float | None = None
    prefix: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)


def measure_model(request: MeasureRequest, batches: Iterator[pa.RecordBatch]) -> Measured:
    """Measures a model on a sample, on the executor that would score with it.

    Args:
        request: the model, and for how long to measure it.
        batches: the sample's instances, with the columns of REQUEST_SCHEMA.

    Returns:
        Counts over the whole sample, and rates measured on a part of the sample.

    Raises:
        MiniplmError: the model cannot be loaded or measured, or no instance of the sample can be scored.
    """
    rows = [row for batch in batches for row in batch.to_pylist()]
    with model_errors(request.alias):
        return _measure(request, rows)


def _measure(request: MeasureRequest, rows: list[TableRow]) -> Measured:
    from miniplm_udf.scoring.models import describe

    with _model(request) as config:
        description = describe(request.alias, config, request.dtype)
        counts = _count(config, description, rows)
        parameters, layers, width = _sizes(config, description)
        scorable = [row for row, n in zip(rows, counts.tokens, strict=True) if n]
        timing = _time(config, description, request, scorable)
        training_rate = None if request.architecture is None else _training_rate(config, request)
    length = request.sequence_length
    return Measured(
        parameters=description.n_parameters,
        dtype=description.dtype,
        device="server" if description.is_served else assigned_device(),
        scored_tokens=counts.scored,
        forward_tokens=sum(counts.windows),
        flops=forward_flops(parameters, layers, width, counts.windows),
        rejects=counts.rejects,
        start_seconds=timing.start_seconds,
        tokens_per_second=timing.tokens_per_second,
        timed_tokens=timing.tokens,
        training_tokens_per_second=training_rate,
        training_flops_per_token=(
            None if training_rate is None else 3 * forward_flops(parameters, layers, width, [length]) / length
        ),
        prefix=description.prefix,
        warnings=[*description.warnings, *timing.warnings],
    )


@contextmanager
def _model(request: MeasureRequest) -> Iterator[ModelConfig]:
    """Yields the model's config; a model that is not trained yet gets a folder with random weights for the block."""
    if request.architecture is None:
        yield request.config
        return
    folder = Path(tempfile.mkdtemp(prefix="miniplm-estimate-"))
    try:
        _write_fresh_model(request, folder)
        yield dataclasses.replace(request.config, path=str(folder))
    finally:
        shutil.rmtree(folder)


def _write_fresh_model(request: MeasureRequest, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.models import describe
    from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE, load_tokenizer

    assert request.tokenizer is not None
    assert request.architecture is not None
    source = model_folder(request.tokenizer)
    separator = describe(request.alias, request.tokenizer).document_separator
    vocabulary = load_tokenizer(source).get_vocab_size(with_added_tokens=True)
    try:
        architecture = AutoConfig.for_model(**{"vocab_size": vocabulary, **request.architecture})
        AutoModelForCausalLM.from_config(architecture).save_pretrained(folder, max_shard_size="1TB")
    except Exception as error:
        raise errors.ConfigError(
            f"reference.architecture: expected keywords of AutoConfig, found {request.architecture} "
            f"({type(error).__name__}: {error})"
        ) from error
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    # As the trainer writes it: not a chat model, even if its tokenizer comes from one.
    tokenizer_config = {"eos_token": separator, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")


# --- counting ---


@dataclasses.dataclass(frozen=True)
class _TokenCounts:
    """Token counts of a sample.

    Attributes:
        tokens: input tokens of the forward passes of each instance; 0 if it cannot be scored.
        windows: input tokens of each forward pass.
        scored: scored tokens.
        rejects: instances that cannot be scored, by reason.
    """

    tokens: list[int]
    windows: list[int]
    scored: int
    rejects: dict[str, int]


def _count(config: ModelConfig, description: ModelDescription, rows: list[TableRow]) -> _TokenCounts:
    from miniplm_udf.scoring.inputs import TextEncoder, TextTokenizer
    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.results import Failure
    from miniplm_udf.scoring.tokenizer import load_tokenizer
    from miniplm_udf.scoring.windows import windows

    tokenizer = TextTokenizer(load_tokenizer(model_folder(config)))
    encoder = TextEncoder(tokenizer, description)
    tokens: list[int] = []
    lengths: list[int] = []
    scored, rejects = 0, Counter[str]()
    tokenized = tokenizer.tokenize([row["text"] for row in rows], [row["segment_ends"] for row in rows])
    for item, row in zip(tokenized, rows, strict=True):
        encoded = encoder.encode(item, row["ends_document"])
        if isinstance(encoded, Failure):
            rejects[encoded.reason] += 1
            tokens.append(0)
            continue
        every = windows(len(encoded.ids) - 1, description.context_tokens, description.window_overlap_tokens)
        window_tokens = [
            len(encoder.in_front(window)) + len(window)
            for window in every
            if encoded.scored[window.first_scored : window.end].any()
        ]
        tokens.append(sum(window_tokens))
        lengths += window_tokens
        scored += int(encoded.scored.sum())
    return _TokenCounts(tokens, lengths, scored, dict(rejects))


def _sizes(config: ModelConfig, description: ModelDescription) -> tuple[int, int, int]:
    """Returns the parameters in matrix products, the layers with attention, and heads times their width."""
    from transformers import AutoConfig

    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.model_flops import attention_layers

    whole: Any = AutoConfig.from_pretrained(model_folder(config), trust_remote_code=config.trust_remote_code)
    text = whole.get_text_config()
    hidden, heads = int(text.hidden_size), int(getattr(text, "num_attention_heads", 0) or 0)
    width = heads * int(getattr(text, "head_dim", None) or (hidden // heads if heads else 0))
    # An embedding that is not tied to the output layer is a table of rows, not a factor of a product.
    embedding = 0 if text.tie_word_embeddings else int(text.vocab_size) * hidden
    return max(0, description.n_parameters - embedding), attention_layers(text), width


# --- timing ---


@dataclasses.dataclass(frozen=True)
class _Timing:
    """The timing of a scorer; the names are the fields of `Measured`. A model with random weights has no warnings."""

    start_seconds: float
    tokens_per_second: float
    tokens: int
    warnings: list[str]


def _time(config: ModelConfig, description: ModelDescription, request: MeasureRequest, rows: list[TableRow]) -> _Timing:
    """Loads the model, scores one batch twice, then a random part of the other instances for about `seconds`.

    Raises:
        CorpusError: no instance can be scored.
        ScoringError: the scorer scores none of the instances.
    """
    if not rows:
        raise errors.CorpusError("expected instances of the split `pool` that can be scored, found none in the sample")
    LOGGER.info("estimate: %s: loading the model, then scoring for about %.0f s", request.alias, request.seconds)
    started = time.monotonic()
    scorer = ModelScorerFactory(config, description, request.score)()
    loading = time.monotonic() - started
    order = random.Random(0).sample(rows, len(rows))
    batch_bytes = scorer.tokens_per_batch * _BYTES_PER_TOKEN
    batch = _first_bytes(order, batch_bytes)
    warm_tokens, warm_seconds = _score(scorer, batch)
    # The rate of the job is the rate of compiled code. A job does not wait for it, so this is no time of the start.
    while scorer.finish_compiling():
        _score(scorer, batch)
    _, batch_seconds = _score(scorer, batch)
    # At least two batches, also of a model that is too slow for two batches in `seconds`.
    n_bytes = max(2 * batch_bytes, round(batch_bytes * request.seconds / batch_seconds))
    # A sample of one batch has no other instances: the batch is scored again.
    tokens, seconds = _score(scorer, _first_bytes(order[len(batch) :] or order, n_bytes))
    rate = tokens / seconds
    start_seconds = loading + max(0.0, warm_seconds - warm_tokens / rate)
    return _Timing(start_seconds, rate, tokens, [] if request.architecture is not None else scorer.warnings)


def _first_bytes(rows: list[TableRow], n_bytes: int) -> list[TableRow]:
    """Returns the first rows whose texts together have `n_bytes`; at least one row."""
    sizes = itertools.accumulate(len(row["text"].encode("utf-8")) for row in rows)
    return rows[: 1 + sum(1 for size in sizes if size < n_bytes)]


def _score(scorer: Any, rows: list[TableRow]) -> tuple[int, float]:
    """Scores rows; returns the scored tokens and the seconds."""
    started = time.perf_counter()
    results = scorer.score(*([row[name] for row in rows] for name in ("text", "segment_ends", "ends_document")))
    tokens = sum(getattr(result, "n_tokens", 0) for result in results)
    if not tokens:
        failures = {getattr(result, "reason", None): getattr(result, "detail", None) for result in results}
        raise errors.ScoringError(f"expected scores of a sample of {len(rows)} instances, found failures: {failures}")
    return tokens, time.perf_counter() - started


def _training_rate(config: ModelConfig, request: MeasureRequest) -> float:
    """Measures the tokens per second of an optimiser step: micro-batches forward and backward, then AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    assert request.train is not None
    LOGGER.info("estimate: %s: training a few steps with random weights", request.alias)
    train, device = request.train, assigned_device()
    model: Any = AutoModelForCausalLM.from_pretrained(str(config.path)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rows = min(train.micro_batch_sequences, train.batch_sequences)
    tokens_BT = torch.randint(0, model.config.vocab_size, (rows, request.sequence_length + 1), device=device)
    is_half = train.dtype == "bfloat16" or (train.dtype == "auto" and device != "cpu")

    def micro_batch() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_half):
            logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def seconds_of(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    micro_batch()
    update()  # creates the state of AdamW
    passes = [(seconds_of(micro_batch), seconds_of(update)) for _ in range(_TRAINING_STEPS)]
    micro_seconds, update_seconds = (sum(column) / _TRAINING_STEPS for column in zip(*passes, strict=True))
    step_seconds = micro_seconds * train.batch_sequences / rows + update_seconds
    return train.batch_sequences * request.sequence_length / step_seconds
