"""Estimates the cost of an experiment's scoring before it runs: `estimate`, for `miniplm estimate`.

Input: an `ExperimentConfig`, and bytes to sample. Output: an `Estimate`: bytes, documents and instances of the corpus;
tokens, FLOPs and seconds of each scored model; bytes of the tables; rejects. A sample of the input (`sample.py`) goes
through ingest's own function and is measured with the models (`measure.py`), both on executors; this module scales the
results to the whole corpus. Driver only, no torch. Writes nothing under `root`. A rerun on the same corpus gives the
same counts, and seconds as the machine is then.
"""

import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.estimate.measure import REQUEST_SCHEMA, Measured, MeasureRequest, measure_model
from miniplm_udf.estimate.results import (
    CorpusEstimate,
    Estimate,
    Gpus,
    ModelEstimate,
    RejectEstimate,
    SampleFacts,
    StageEstimate,
    TrainingEstimate,
)
from miniplm_udf.estimate.sample import Sample, take_sample
from miniplm_udf.estimate.table_bytes import table_bytes
from miniplm_udf.ingestion.copies import pack_function
from miniplm_udf.ingestion.inputs import find_inputs
from miniplm_udf.ingestion.packed import packed_sample
from miniplm_udf.ingestion.query import chunking_model, executor_tokenizer_hash
from miniplm_udf.ingestion.splits import INSTANCE, REJECT, ChunkingSpec, make_ingest_function, output_spark_schema
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.scoring.description import settled_dtype, with_absolute_path
from miniplm_udf.workers.remote import run_over_rows

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.estimate")

# Seconds of scoring that a model's rate is measured on.
MEASURE_SECONDS = 20.0
# Seconds that `miniplm score` takes on a single machine without its models: describing them, two queries, their
# checkpoints and commits (measured on the demo, on 2 cores: 20 to 25 s).
SPARK_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class _CutSample:
    """The sample as ingest would write it.

    Attributes:
        instances: rows with `split`, `text`, `n_bytes`, `segment_ends` and more columns of `instances`.
        rejects: rejected rows, by reason.
    """

    instances: list[TableRow]
    rejects: dict[str, int]

    @property
    def n_documents(self) -> int:
        return sum(row["starts_document"] + len(row["segment_ends"]) for row in self.instances)

    @property
    def pool(self) -> list[TableRow]:
        """The instances that would be scored."""
        return [row for row in self.instances if row["split"] == "pool"]


def estimate(spark: "SparkSession", config: ExperimentConfig, sample_bytes: int, gpus: Gpus) -> Estimate:
    """Returns an estimate of ingest, the reference's training and the scoring of an experiment.

    Args:
        spark: a session.
        config: the experiment.
        sample_bytes: bytes of text to read; a smaller corpus is read whole.
        gpus: hardware for `gpu_seconds`.

    Raises:
        ConfigError: the input, a field or a model does not fit; `ingest` and `score` would refuse it too.
        ModelLoadError: a model cannot be loaded.
        CorpusError: the sample has no text for the models to score.
    """
    started = time.monotonic()
    inputs = find_inputs(spark, config.ingest)
    LOGGER.info("estimate: reading about %s bytes of %s", f"{sample_bytes:,}", config.ingest.inputs)
    sample = take_sample(spark, inputs, config.ingest, sample_bytes)
    cut = _cut(spark, config, sample)
    if not cut.pool:
        raise CorpusError(
            f"expected text of the split `pool` in a sample of {sample.rows.num_rows} rows, found "
            f"{len(cut.instances)} instances of other splits and rejects {cut.rejects or 'none'}; sample more with "
            "--sample-bytes, or lower the shares of ingest.split"
        )
    measured = {alias: _measure(spark, config, alias, cut) for alias in config.scored_aliases}
    # Only the share `score.sample` of the pool is scored.
    scored_scale = sample.scale * config.score.sample
    models = {alias: _model_estimate(result, scored_scale, gpus) for alias, result in measured.items()}
    rejects = _reject_estimates(config, sample, cut, measured)
    return Estimate(
        sample=_sample_facts(sample, time.monotonic() - started),
        corpus=_corpus_estimate(sample, cut),
        models=models,
        reference_training=_training_estimate(config, measured, gpus),
        score=_stage_estimate(config, models),
        tables=table_bytes(config.scored_aliases, [row["n_bytes"] for row in cut.pool], scored_scale),
        rejects=rejects,
        too_many_rejects=any(stage.too_many for stage in rejects.values()),
        gpus=gpus,
    )


# --- on executors ---


def _cut(spark: "SparkSession", config: ExperimentConfig, sample: Sample) -> _CutSample:
    """Cuts the sampled documents into instances by ingest's own function; equal instances count once."""
    model = chunking_model(config)
    spec = ChunkingSpec.of(config.ingest, model, executor_tokenizer_hash(spark, model))
    rows = spark.createDataFrame(sample.rows).coalesce(1)
    if spec.mode == "packed":
        cut = packed_sample(rows, config, pack_function(config.ingest, model, spec))
    else:
        cut = rows.mapInArrow(make_ingest_function(config.ingest, model, spec), output_spark_schema())
    columns = ["kind", "key", "split", "text", "segment_ends", "starts_document", "ends_document", "n_bytes", "reason"]
    by_key = {row["key"]: row for row in cut.select(*columns, "content_hash").toArrow().to_pylist()}
    return _CutSample(
        [row for row in by_key.values() if row["kind"] == INSTANCE],
        dict(Counter(row["reason"] for row in by_key.values() if row["kind"] == REJECT)),
    )


def _measure(spark: "SparkSession", config: ExperimentConfig, alias: str, cut: _CutSample) -> Measured:
    import pyarrow as pa

    rows = [{name: row[name] for name in REQUEST_SCHEMA.names} for row in cut.pool]
    frame = spark.createDataFrame(pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)).coalesce(1)
    return run_over_rows(frame, functools.partial(measure_model, _request(config, alias)))


def _request(config: ExperimentConfig, alias: str) -> MeasureRequest:
    model = config.models[alias]
    record = storage.read_json(config.layout.model_record(alias)) if model.dtype == "auto" else None
    located = dataclasses.replace(model, path=model.path or config.layout.model(alias))
    request = MeasureRequest(
        alias=alias,
        config=with_absolute_path(located),
        dtype=settled_dtype(record),
        score=config.score,
        seconds=MEASURE_SECONDS,
    )
    if model.path is not None or _is_trained(config, alias):
        return request
    assert config.reference is not None
    return dataclasses.replace(
        request,
        config=model,
        architecture=config.reference.architecture,
        tokenizer=with_absolute_path(config.models[config.reference.tokenizer]),
        train=config.reference.train,
        sequence_length=config.pack.sequence_length,
    )


def _is_trained(config: ExperimentConfig, alias: str) -> bool:
    return storage.exists(config.layout.model(alias, "config.json"))


# --- from the sample to the corpus ---


def _sample_facts(sample: Sample, seconds: float) -> SampleFacts:
    return SampleFacts(
        rows=sample.rows.num_rows,
        read_bytes=sample.read_bytes,
        share=min(1.0, 1 / sample.scale),
        files_tried=sample.n_tried,
        seconds=round(seconds, 1),
    )


def _corpus_estimate(sample: Sample, cut: _CutSample) -> CorpusEstimate:
    splits = Counter(row["split"] for row in cut.instances)
    return CorpusEstimate(
        files=sample.n_files,
        input_bytes=sample.input_bytes,
        text_bytes=round(sum(row["n_bytes"] for row in cut.instances) * sample.scale),
        documents=round(cut.n_documents * sample.scale),
        instances=round(len(cut.instances) * sample.scale),
        by_split={split: round(splits[split] * sample.scale) for split in schemas.SPLITS},
    )


def _model_estimate(measured: Measured, scale: float, gpus: Gpus) -> ModelEstimate:
    tokens, flops = measured.scored_tokens * scale, measured.flops * scale
    return ModelEstimate(
        parameters=measured.parameters,
        dtype=measured.dtype,
        device=measured.device,
        fresh_weights=measured.training_tokens_per_second is not None,
        tokens=round(tokens),
        flops=flops,
        tokens_per_second=round(measured.tokens_per_second, 2),
        timed_tokens=measured.timed_tokens,
        start_seconds=round(measured.start_seconds, 2),
        seconds=round(tokens / measured.tokens_per_second, 2),
        gpu_seconds=gpus.seconds(flops),
        prefix=measured.prefix,
        warnings=measured.warnings,
    )


def _training_estimate(
    config: ExperimentConfig, measured: Mapping[str, Measured], gpus: Gpus
) -> TrainingEstimate | None:
    result = measured.get(config.reference.alias) if config.reference else None
    if result is None or result.training_tokens_per_second is None or result.training_flops_per_token is None:
        return None
    assert config.reference is not None
    train = config.reference.train
    tokens = train.steps * train.batch_sequences * config.pack.sequence_length
    flops = result.training_flops_per_token * tokens
    return TrainingEstimate(
        tokens=tokens,
        flops=flops,
        tokens_per_second=round(result.training_tokens_per_second, 2),
        seconds=round(tokens / result.training_tokens_per_second, 2),
        gpu_seconds=gpus.seconds(flops),
    )


def _stage_estimate(config: ExperimentConfig, models: Mapping[str, ModelEstimate]) -> StageEstimate:
    seconds = sum(model.seconds for model in models.values())
    start = sum(model.start_seconds for model in models.values())
    return StageEstimate(
        workers=config.score.workers,
        model_seconds=round(seconds, 2),
        start_seconds=round(start, 2),
        spark_seconds=SPARK_SECONDS,
        stage_seconds=round(seconds / config.score.workers + start + SPARK_SECONDS, 2),
        gpu_seconds=sum(model.gpu_seconds for model in models.values()),
    )


def _reject_estimates(
    config: ExperimentConfig, sample: Sample, cut: _CutSample, measured: Mapping[str, Measured]
) -> dict[str, RejectEstimate]:
    """Rejects of both stages."""
    ingest = {reason: round(n * sample.scale) for reason, n in cut.rejects.items()}
    if sample.unreadable:
        ingest["unreadable_file"] = round(len(sample.unreadable) / sample.n_tried * sample.n_files)
    by_reason: Counter[str] = Counter()
    for result in measured.values():
        by_reason.update(result.rejects)
    scored_scale = sample.scale * config.score.sample
    score = {reason: round(n * scored_scale) for reason, n in by_reason.items()}
    n_rows = round((cut.n_documents + sum(cut.rejects.values())) * sample.scale)
    n_pairs = round(len(cut.pool) * len(measured) * scored_scale)
    return {
        "ingest": _reject_estimate(ingest, n_rows, config.ingest.max_reject_share),
        "score": _reject_estimate(score, n_pairs, config.score.max_reject_share),
    }


def _reject_estimate(reasons: dict[str, int], n_rows: int, limit: float) -> RejectEstimate:
    share = sum(reasons.values()) / max(1, n_rows)
    return RejectEstimate(reasons=reasons, of=n_rows, share=share, max_share=limit, too_many=share > limit)
