"""What an experiment's scoring will cost, before anything of it has run: `estimate` for `miniplm estimate`.

Input: an `ExperimentConfig`. Output: plain data: bytes, documents, instances, and tokens, FLOPs and seconds per scored
model, bytes of the tables, what would be rejected. Owns the way from a sample (`sampling`) over ingest's own function
and the models' measurement (`measure`), both on executors, to the whole corpus. Driver only, no torch. Writes nothing
under `root`; the same corpus gives the same counts, and seconds as the machine happens to have them.
"""

import dataclasses
import io
import logging
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config import ExperimentConfig, ModelConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.ingest import INSTANCE, REJECT, ChunkingSpec, make_ingest_function, output_spark_schema
from miniplm_udf.ingestion.ingest_query import chunking_model, executor_tokenizer_hash
from miniplm_udf.ingestion.inputs import find_inputs
from miniplm_udf.measure import MEASURED_DDL, REQUEST_SCHEMA, Measured, MeasureRequest, measure_arrow, measured_of
from miniplm_udf.model_records import record_uri
from miniplm_udf.sampling import Sample, take_sample
from miniplm_udf.scoring.description import with_absolute_path

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.estimate")

# Scoring that a model's rate is measured on.
MEASURE_SECONDS = 20.0
# What `miniplm score` takes on a single machine beside its models: describing them, two queries, their checkpoints and
# commits (measured on the demo, on 2 cores: 20 to 25 s).
SPARK_SECONDS = 20.0
# Instances that the tables' bytes are measured on, and those of a slice that a worker scores at once.
_TABLE_ROWS, _SLICE_ROWS = 50_000, 256


@dataclasses.dataclass(frozen=True)
class Gpus:
    """Hardware to reckon with: `tflops` is the peak of one GPU in the model's dtype, `mfu` the share of it in use."""

    n: int = 1
    mfu: float = 0.4
    tflops: float = 989.0

    def seconds(self, flops: float) -> float:
        return flops / (self.n * self.mfu * self.tflops * 1e12)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The sample as ingest would write it: instances (with `split`, texts and ends) and rejects by reason."""

    instances: list[dict[str, Any]]
    rejects: dict[str, int]

    @property
    def n_documents(self) -> int:
        return sum(row["starts_document"] + len(row["segment_ends"]) for row in self.instances)

    @property
    def pool(self) -> list[dict[str, Any]]:
        return [row for row in self.instances if row["split"] == "pool"]


def estimate(spark: "SparkSession", config: ExperimentConfig, sample_bytes: int, gpus: Gpus) -> dict[str, Any]:
    """Estimates ingest, the reference's training and the scoring of an experiment.

    Args:
        sample_bytes: text to look at; a corpus that is smaller is read whole.
        gpus: hardware for `gpu_seconds`.

    Returns:
        `sample`, `corpus`, `models` (by alias), `reference_training` (None where nothing is to be trained), `score`
        (the stage), `tables` (bytes), `rejects`, `too_many_rejects`.

    Raises:
        ConfigError, ModelLoadError: as `ingest` and `score` would.
        CorpusError: no text for the models to score.
    """
    started = time.monotonic()
    inputs = find_inputs(spark, config.ingest)
    LOGGER.info("estimate: reading about %s bytes of %s", f"{sample_bytes:,}", config.ingest.inputs)
    sample = take_sample(spark, inputs, config.ingest, sample_bytes)
    cut = _cut(spark, config, sample)
    if not cut.pool:
        raise CorpusError(
            f"expected text of the split `pool` in a sample of {sample.rows.num_rows} rows, found "
            f"{len(cut.instances)} instances of other splits and rejects {cut.rejects or 'none'}"
        )
    measured = {alias: _measure(spark, config, alias, cut) for alias in config.scored_aliases}
    # Of the pool, `score.sample` is scored.
    scored_scale = sample.scale * config.score.sample
    models = {alias: _model_facts(one, scored_scale, gpus) for alias, one in measured.items()}
    rejects = _reject_facts(config, sample, cut, measured)
    return {
        "sample": {**_sample_facts(sample), "seconds": round(time.monotonic() - started, 1)},
        "corpus": _corpus_facts(sample, cut),
        "models": models,
        "reference_training": _training_facts(config, measured, gpus),
        "score": _stage_facts(config, models),
        "tables": _table_bytes(config, cut, scored_scale),
        "rejects": rejects,
        "too_many_rejects": any(part["too_many"] for part in rejects.values()),
        "gpus": dataclasses.asdict(gpus),
    }


# --- on executors ---


def _cut(spark: "SparkSession", config: ExperimentConfig, sample: Sample) -> _Cut:
    """Cuts the sample into instances with ingest's own function; what is there twice counts once, as there."""
    model = chunking_model(config)
    spec = ChunkingSpec.of(config.ingest, model, executor_tokenizer_hash(spark, model))
    rows = spark.createDataFrame(sample.rows).coalesce(1)
    cut = rows.mapInArrow(make_ingest_function(config.ingest, model, spec), output_spark_schema())
    columns = ["kind", "key", "split", "text", "segment_ends", "starts_document", "ends_document", "n_bytes", "reason"]
    found = {row["key"]: row for row in cut.select(*columns, "content_hash").toArrow().to_pylist()}
    return _Cut(
        [row for row in found.values() if row["kind"] == INSTANCE],
        dict(Counter(row["reason"] for row in found.values() if row["kind"] == REJECT)),
    )


def _measure(spark: "SparkSession", config: ExperimentConfig, alias: str, cut: _Cut) -> Measured:
    import pyarrow as pa

    rows = [{name: row[name] for name in REQUEST_SCHEMA.names} for row in cut.pool]
    frame = spark.createDataFrame(pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)).coalesce(1)
    (row,) = frame.mapInArrow(measure_arrow(_request(config, alias)), MEASURED_DDL).collect()
    return measured_of(row.asDict())


def _request(config: ExperimentConfig, alias: str) -> MeasureRequest:
    model = config.models[alias]
    record = storage.read_json(record_uri(config, alias)) if model.dtype == "auto" else None
    shared: dict[str, Any] = {
        "alias": alias,
        "dtype": record["dtype"] if record else None,
        "score": config.score,
        "seconds": MEASURE_SECONDS,
    }
    if model.path is None and not _is_trained(config, alias):
        assert config.reference is not None
        return MeasureRequest(
            config=model,
            architecture=config.reference.architecture,
            tokenizer=with_absolute_path(config.models[config.reference.tokenizer]),
            train=config.reference.train,
            sequence_length=config.pack.sequence_length,
            **shared,
        )
    path = model.path or config.model_uri(alias)
    located: ModelConfig = dataclasses.replace(model, path=path)
    return MeasureRequest(config=with_absolute_path(located), **shared)


def _is_trained(config: ExperimentConfig, alias: str) -> bool:
    return storage.exists(storage.join(config.model_uri(alias), "config.json"))


# --- from the sample to the corpus ---


def _sample_facts(sample: Sample) -> dict[str, Any]:
    return {
        "rows": sample.rows.num_rows,
        "read_bytes": sample.read_bytes,
        "share": min(1.0, 1 / sample.scale),
        "files_tried": sample.n_tried,
    }


def _corpus_facts(sample: Sample, cut: _Cut) -> dict[str, Any]:
    splits = Counter(row["split"] for row in cut.instances)
    return {
        "files": sample.n_files,
        "input_bytes": sample.input_bytes,
        "text_bytes": round(sum(row["n_bytes"] for row in cut.instances) * sample.scale),
        "documents": round(cut.n_documents * sample.scale),
        "instances": round(len(cut.instances) * sample.scale),
        "by_split": {split: round(splits[split] * sample.scale) for split in schemas.SPLITS},
    }


def _model_facts(one: Measured, scale: float, gpus: Gpus) -> dict[str, Any]:
    tokens, flops = one.scored_tokens * scale, one.flops * scale
    return {
        "parameters": one.parameters,
        "dtype": one.dtype,
        "device": one.device,
        "fresh_weights": one.training_tokens_per_second is not None,
        "tokens": round(tokens),
        "flops": flops,
        "tokens_per_second": round(one.tokens_per_second, 2),
        "timed_tokens": one.timed_tokens,
        "start_seconds": round(one.start_seconds, 2),
        "seconds": round(tokens / one.tokens_per_second, 2),
        "gpu_seconds": gpus.seconds(flops),
        "warnings": one.warnings,
    }


def _training_facts(config: ExperimentConfig, measured: dict[str, Measured], gpus: Gpus) -> dict[str, Any] | None:
    one = measured.get(config.reference.alias) if config.reference else None
    if one is None or one.training_tokens_per_second is None or one.training_flops_per_token is None:
        return None
    assert config.reference is not None
    train = config.reference.train
    tokens = train.steps * train.batch_sequences * config.pack.sequence_length
    flops = one.training_flops_per_token * tokens
    return {
        "tokens": tokens,
        "flops": flops,
        "tokens_per_second": round(one.training_tokens_per_second, 2),
        "seconds": round(tokens / one.training_tokens_per_second, 2),
        "gpu_seconds": gpus.seconds(flops),
    }


def _stage_facts(config: ExperimentConfig, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The score stage: a worker loads each model once, and the instances are shared out between workers."""
    seconds = sum(model["seconds"] for model in models.values())
    start = sum(model["start_seconds"] for model in models.values())
    return {
        "workers": config.score.workers,
        "model_seconds": round(seconds, 2),
        "start_seconds": round(start, 2),
        "spark_seconds": SPARK_SECONDS,
        "stage_seconds": round(seconds / config.score.workers + start + SPARK_SECONDS, 2),
        "gpu_seconds": sum(model["gpu_seconds"] for model in models.values()),
    }


def _reject_facts(
    config: ExperimentConfig, sample: Sample, cut: _Cut, measured: dict[str, Measured]
) -> dict[str, dict[str, Any]]:
    """Rejects of both stages by reason, scaled, and whether there are more than the stage allows."""
    ingest = {reason: round(n * sample.scale) for reason, n in cut.rejects.items()}
    if sample.unreadable:
        ingest["unreadable_file"] = round(len(sample.unreadable) / sample.n_tried * sample.n_files)
    by_reason: Counter[str] = Counter()
    for one in measured.values():
        by_reason.update(one.rejects)
    scored_scale = sample.scale * config.score.sample
    score = {reason: round(n * scored_scale) for reason, n in by_reason.items()}
    n_rows = round((cut.n_documents + sum(cut.rejects.values())) * sample.scale)
    n_pairs = round(len(cut.pool) * len(measured) * scored_scale)
    return {
        "ingest": _shares(ingest, n_rows, config.ingest.max_reject_share),
        "score": _shares(score, n_pairs, config.score.max_reject_share),
    }


def _shares(reasons: dict[str, int], of: int, limit: float) -> dict[str, Any]:
    share = sum(reasons.values()) / max(1, of)
    return {"reasons": reasons, "of": of, "share": share, "max_share": limit, "too_many": share > limit}


def _table_bytes(config: ExperimentConfig, cut: _Cut, scale: float) -> dict[str, int]:
    """Bytes of `scores` and `score_matrix`, from made-up rows of them that are written to memory as Parquet."""
    aliases = config.scored_aliases
    n_instances = len(cut.pool) * scale
    matrix = schemas.score_matrix(aliases)
    return {
        "scores": round(_bytes_per_instance(schemas.SCORES, cut, n_instances, len(aliases)) * n_instances),
        "score_matrix": round(_bytes_per_instance(matrix, cut, n_instances, 1) * n_instances),
    }


def _bytes_per_instance(table: schemas.Table, cut: _Cut, n_instances: float, n_models: int) -> float:
    """What an instance takes: ids and numbers that differ from row to row, words and times that do not.

    A worker writes a slice's rows of one model and then of the next, so an id comes again soon, and compresses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    n = min(round(n_instances), _TABLE_ROWS)
    order = [
        i for start in range(0, n, _SLICE_ROWS) for _ in range(n_models) for i in range(start, start + _SLICE_ROWS)
    ]
    order = [i for i in order if i < n]

    def column(name: str, kind: str) -> list[Any]:
        if name in ("instance_id", "content_hash"):
            values = [f"{rng.getrandbits(128):032x}" for _ in range(n)]
            return [values[i] for i in order]
        if kind == "float64":
            return [rng.random() for _ in order]
        if name.endswith(("_bytes", "n_tokens")):
            return [rng.choice(cut.pool)["n_bytes"] for _ in order]
        constant: Any = {"timestamp": 0, "int64": 0, "int32": 0, "bool": False, "binary": b""}.get(kind, "0" * 32)
        return [constant] * len(order)

    schema = table.arrow_schema()
    columns = [pa.array(column(one.name, one.type), schema.field(one.name).type) for one in table.columns]
    written = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), written)  # Snappy, as Spark's default
    return written.tell() / n
