"""What scoring a sample costs, found where the models run: token counts, model FLOPs, and seconds of real scoring.

Input: one model (`MeasureRequest`) and instances of a sample, as record batches. Output: a `Measured`, one row of JSON,
or an error's class and message. Owns the counting and the timing; the scoring is the jobs' own (`model_scorers`,
`Scorer`). A model that is not trained yet is measured with fresh weights of its architecture: as fast, and its scores
are thrown away. Executor side; torch and transformers are loaded inside the functions. A retry measures again.

    FLOPs(training) = 3 FLOPs(forward), which `scoring.flops` has
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
from miniplm_udf.config import ModelConfig, ScoreConfig, TrainConfig
from miniplm_udf.progress import configure_logging
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.flops import forward_flops
from miniplm_udf.udf import ArrowFunction
from miniplm_udf.workers.model_scorers import ModelScorerFactory, assigned_device

LOGGER = logging.getLogger("miniplm.estimate")

REQUEST_SCHEMA = pa.schema(
    [("text", pa.string()), ("segment_ends", pa.list_(pa.int32())), ("ends_document", pa.bool_())]
)
MEASURED_DDL = "measured_json string, error_class string, error string"
_SCHEMA = pa.schema([("measured_json", pa.string()), ("error_class", pa.string()), ("error", pa.string())])
_BYTES_PER_TOKEN = 4
_TRAINING_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """What to measure, and for how long.

    Attributes:
        config: the model; of one that is not trained yet, the model whose tokenizer it takes is `tokenizer`.
        dtype: settled at an earlier scoring, or None.
        seconds: of scoring to aim at, loading and a first batch aside.
        architecture: of a model that is not trained yet; None for one that is there.
        train: how it will be trained.
        sequence_length: tokens of a training sequence.
    """

    alias: str
    config: ModelConfig
    dtype: str | None
    score: ScoreConfig
    seconds: float
    architecture: dict[str, Any] | None = None
    tokenizer: ModelConfig | None = None
    train: TrainConfig | None = None
    sequence_length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a sample of instances and one model.

    Attributes:
        parameters: of the weight files.
        dtype: of the forward pass.
        device: that it ran on.
        scored_tokens: of the whole sample: what `scores.n_tokens` would add up to.
        forward_tokens: inputs of forward passes: more, where windows overlap.
        flops: model FLOPs to score the sample.
        rejects: instances that cannot be scored, by reason.
        start_seconds: loading, and what the first batch took longer than later ones.
        tokens_per_second: scored tokens, steady state.
        timed_tokens: scored tokens that the rate was measured on.
        training_tokens_per_second: of one optimiser step; None for a model that is there.
        training_flops_per_token: None for a model that is there.
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
    warnings: list[str] = dataclasses.field(default_factory=list)


def measure_arrow(request: MeasureRequest) -> ArrowFunction:
    """The function for `DataFrame.mapInArrow(measure_arrow(request), MEASURED_DDL)`, over one partition.

    Its input has the columns of REQUEST_SCHEMA.
    """

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        configure_logging()
        row: dict[str, str | None] = dict.fromkeys(_SCHEMA.names)
        rows = [row for batch in batches for row in batch.to_pylist()]
        try:
            row["measured_json"] = json.dumps(dataclasses.asdict(_measure(request, rows)))
        except errors.MiniplmError as error:
            row["error_class"], row["error"] = type(error).__name__, str(error)
        except Exception as error:  # as data to the driver, which raises
            LOGGER.exception("model %s cannot be measured", request.alias)
            row["error_class"] = "ModelLoadError"
            row["error"] = f"models.{request.alias}: {type(error).__name__}: {error}"
        yield pa.RecordBatch.from_pylist([row], schema=_SCHEMA)

    return run


def measured_of(row: dict[str, Any]) -> Measured:
    """What a row of `measure_arrow` says.

    Raises:
        MiniplmError: of the class and with the message that the executor met.
    """
    if row["error_class"] is not None:
        raise getattr(errors, row["error_class"])(row["error"])
    return Measured(**json.loads(row["measured_json"]))


def _measure(request: MeasureRequest, rows: list[dict[str, Any]]) -> Measured:
    from miniplm_udf.scoring.models import describe

    with _model(request) as config:
        description = describe(request.alias, config, request.dtype)
        counts = _count(config, description, rows)
        parameters, layers, width = _sizes(config, description)
        timed = _time(config, description, request, [row for row, n in zip(rows, counts.tokens, strict=True) if n])
        training = None if request.architecture is None else _training_rate(config, request)
    length = [request.sequence_length]
    return Measured(
        parameters=description.n_parameters,
        dtype=description.dtype,
        device=assigned_device(),
        scored_tokens=counts.scored,
        forward_tokens=sum(counts.windows),
        flops=forward_flops(parameters, layers, width, counts.windows),
        rejects=counts.rejects,
        training_tokens_per_second=training,
        training_flops_per_token=None
        if training is None
        else 3 * forward_flops(parameters, layers, width, length) / length[0],
        warnings=description.warnings,
        **timed,
    )


@contextmanager
def _model(request: MeasureRequest) -> Iterator[ModelConfig]:
    """The model's config; for one that is not trained yet, of a folder with fresh weights that goes away again."""
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

    from miniplm_udf.scoring.models import describe, resolve
    from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE, load_tokenizer

    assert request.tokenizer is not None
    assert request.architecture is not None
    source = resolve(request.tokenizer)
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
    # As it will be: no chat model, even where its tokenizer comes from one.
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": separator}), encoding="utf-8")


# --- counting ---


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Forward tokens of each instance (0: it cannot be scored), lengths of all windows, scored tokens, reasons."""

    tokens: list[int]
    windows: list[int]
    scored: int
    rejects: dict[str, int]


def _count(config: ModelConfig, description: ModelDescription, rows: list[dict[str, Any]]) -> _Counts:
    from miniplm_udf.scoring.inputs import Failure, TextEncoder, TextTokenizer
    from miniplm_udf.scoring.models import resolve
    from miniplm_udf.scoring.tokenizer import load_tokenizer
    from miniplm_udf.scoring.windows import windows

    tokenizer = TextTokenizer(load_tokenizer(resolve(config)))
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
        found = windows(len(encoded.ids) - 1, description.context_tokens, description.window_overlap_tokens)
        own = [len(window) for window in found if encoded.scored[window.first_scored : window.end].any()]
        tokens.append(sum(own))
        lengths += own
        scored += int(encoded.scored.sum())
    return _Counts(tokens, lengths, scored, dict(rejects))


def _sizes(config: ModelConfig, description: ModelDescription) -> tuple[int, int, int]:
    """Parameters in matrix products, layers with attention, heads times their width."""
    from transformers import AutoConfig

    from miniplm_udf.scoring.models import resolve

    found: Any = AutoConfig.from_pretrained(resolve(config), trust_remote_code=config.trust_remote_code)
    plain = found.get_text_config()
    hidden, heads = int(plain.hidden_size), int(getattr(plain, "num_attention_heads", 0) or 0)
    width = heads * int(getattr(plain, "head_dim", None) or (hidden // heads if heads else 0))
    looked_up = 0 if plain.tie_word_embeddings else int(plain.vocab_size) * hidden
    return max(0, description.n_parameters - looked_up), int(plain.num_hidden_layers), width


# --- timing ---


def _time(
    config: ModelConfig, description: ModelDescription, request: MeasureRequest, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Loads the model, scores one batch twice, then a random part of the other instances for about `seconds`."""
    if not rows:
        raise errors.CorpusError("expected instances of the split `pool` that can be scored, found none in the sample")
    LOGGER.info("estimate: %s: loading it, then scoring for about %.0f s", request.alias, request.seconds)
    started = time.monotonic()
    scorer = ModelScorerFactory(config, description, request.score)()
    loading = time.monotonic() - started
    order = random.Random(0).sample(rows, len(rows))
    batch_bytes = scorer.tokens_per_batch * _BYTES_PER_TOKEN
    batch = _first_bytes(order, batch_bytes)
    warm_tokens, warm_seconds = _score(scorer, batch)  # it may compile the model
    _, batch_seconds = _score(scorer, batch)
    # At least two batches: of a slow model, that is what fits.
    wanted = max(2 * batch_bytes, round(batch_bytes * request.seconds / batch_seconds))
    # Of a sample that small, the one batch is scored again: a rate of nothing would be worse.
    tokens, seconds = _score(scorer, _first_bytes(order[len(batch) :] or order, wanted))
    rate = tokens / seconds
    return {
        "start_seconds": loading + max(0.0, warm_seconds - warm_tokens / rate),
        "tokens_per_second": rate,
        "timed_tokens": tokens,
    }


def _first_bytes(rows: list[dict[str, Any]], n_bytes: int) -> list[dict[str, Any]]:
    """The first rows that have `n_bytes` of text together; at least one."""
    sizes = itertools.accumulate(len(row["text"].encode("utf-8")) for row in rows)
    return rows[: 1 + sum(1 for size in sizes if size < n_bytes)]


def _score(scorer: Any, rows: list[dict[str, Any]]) -> tuple[int, float]:
    """Scored tokens, and seconds."""
    started = time.perf_counter()
    results = scorer.score(*([row[name] for row in rows] for name in ("text", "segment_ends", "ends_document")))
    tokens = sum(getattr(result, "n_tokens", 0) for result in results)
    if not tokens:
        found = {getattr(result, "reason", None): getattr(result, "detail", None) for result in results}
        raise errors.ScoringError(f"expected scores of a sample of {len(rows)} instances, found failures: {found}")
    return tokens, time.perf_counter() - started


def _training_rate(config: ModelConfig, request: MeasureRequest) -> float:
    """Tokens per second of an optimiser step: micro-batches forward and backward, then AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    assert request.train is not None
    LOGGER.info("estimate: %s: training a few steps of it, with fresh weights", request.alias)
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
    update()  # makes AdamW's state
    passes = [(seconds_of(micro_batch), seconds_of(update)) for _ in range(_TRAINING_STEPS)]
    micro_seconds, update_seconds = (sum(column) / _TRAINING_STEPS for column in zip(*passes, strict=True))
    step_seconds = micro_seconds * train.batch_sequences / rows + update_seconds
    return train.batch_sequences * request.sequence_length / step_seconds
