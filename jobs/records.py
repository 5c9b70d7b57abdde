"""What a stage read and made, kept under `<root>/_stages/`, so that an unchanged stage is skipped.

Inputs: the session and the config. Output: one JSON record a stage: a fingerprint of its config and of its inputs'
versions, its summary, its seconds. Owns the rule "unchanged means skipped". A record is
written after the stage has committed: a stage that was killed has none for what it was doing, and runs again.
Driver only.
"""

import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage, tables
from miniplm_udf.catalog import register_tables
from miniplm_udf.config import ExperimentConfig, fingerprint, to_dict
from miniplm_udf.rules import resolve

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STAGES = ("ingest", "annotate", "reference", "score", "proxy", "refine", "pack", "train", "evaluate", "report")

LOGGER = logging.getLogger("miniplm.jobs")

Inputs = Callable[["SparkSession", ExperimentConfig], Any]


def record_uri(config: ExperimentConfig, stage: str) -> str:
    return storage.join(config.root, "_stages", f"{stage}.json")


def read_record(config: ExperimentConfig, stage: str) -> dict[str, Any] | None:
    record: dict[str, Any] | None = storage.read_json(record_uri(config, stage))
    return record


def _model_states(config: ExperimentConfig, names: list[str], file: str) -> dict[str, Any]:
    return {name: storage.read_json(storage.join(config.model_uri(name), file)) for name in names}


def _ingest_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    from miniplm_udf.ingestion.inputs import input_state

    tokenizer_of = config.models.get(config.ingest.chunking.tokenizer)
    return [to_dict(config.ingest), to_dict(tokenizer_of) if tokenizer_of else None, input_state(spark, config.ingest)]


def _annotate_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    from miniplm_udf.annotations.contamination import files_of

    given = config.annotate.contamination if config.annotate else None
    files = files_of(spark, given) if given else []
    return [to_dict(config.annotate), tables.version(spark, config.table_uri("instances")), list(map(to_dict, files))]


def _score_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    aliases = config.scored_aliases
    # Weights may change under an old path; a hub name or a file of a package is no path, and its state is empty.
    weights = {alias: storage.folder_state(config.models[alias].path or config.model_uri(alias)) for alias in aliases}
    # How fast is not part of what: a score is the same whatever the budget, the workers and the trigger.
    return [
        {alias: to_dict(config.models[alias]) for alias in aliases},
        tables.version(spark, config.table_uri("instances")),
        {
            alias: [file for file in state if not file[0].endswith("evaluation.json")]
            for alias, state in weights.items()
        },
        [config.score.max_reject_share, config.score.sample],
    ]


def _refine_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    # What a rule's name stands for belongs to it.
    scores = {name: resolve(corpus).score for name, corpus in config.refine.corpora.items()}
    read = ["score_matrix", "annotations", *(["proxy_scores"] if config.proxy else [])]
    return [to_dict(config.refine), scores, [tables.version(spark, config.table_uri(name)) for name in read]]


def _proxy_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    versions = [tables.version(spark, config.table_uri(name)) for name in ("instances", "score_matrix")]
    return [to_dict(config.proxy) if config.proxy else None, config.refine.tokens_of, versions]


def _students_corpora(config: ExperimentConfig) -> list[str]:
    return sorted({student.corpus for student in config.students.values()})


def _pack_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    pairs = sorted({(student.corpus, student.tokenizer) for student in config.students.values()})
    versions = {c: tables.version(spark, config.table_uri(f"refined/{c}")) for c in _students_corpora(config)}
    tokenizers = {name: to_dict(config.tokenizers[name]) for _, name in pairs}
    return [to_dict(config.pack), pairs, versions, tokenizers]


def _train_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    students = config.students.values()
    packed = sorted({f"packed/{student.corpus}/{student.tokenizer}" for student in students})
    versions = {name: tables.version(spark, config.table_uri(name)) for name in packed}
    return [{name: to_dict(s) for name, s in config.students.items()}, versions, to_dict(config.mlflow)]


def _evaluate_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    names = [*config.students, *([config.reference.alias] if config.reference else [])]
    runs = {name: (s or {}).get("run_id") for name, s in _model_states(config, names, "training.json").items()}
    return [to_dict(config.evaluate), runs, tables.version(spark, config.table_uri("instances"))]


def _report_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    earlier = [read_record(config, stage) for stage in ("ingest", "score", "refine", "train", "evaluate")]
    finished = [(record or {}).get("finished_at") for record in earlier]
    return [to_dict(config.report), finished]


def _reference_inputs(spark: "SparkSession", config: ExperimentConfig) -> Any:
    return [to_dict(config.reference) if config.reference else None, config.pack.sequence_length]


INPUTS: dict[str, Inputs] = {
    "ingest": _ingest_inputs,
    "annotate": _annotate_inputs,
    "reference": _reference_inputs,
    "score": _score_inputs,
    "proxy": _proxy_inputs,
    "refine": _refine_inputs,
    "pack": _pack_inputs,
    "train": _train_inputs,
    "evaluate": _evaluate_inputs,
    "report": _report_inputs,
}


def _has_outputs(spark: "SparkSession", config: ExperimentConfig, stage: str) -> bool:
    """Whether all that the stage makes is there still."""
    pairs = {(student.corpus, student.tokenizer) for student in config.students.values()}
    made = {
        "ingest": ["instances"],
        "annotate": ["annotations"],
        "score": ["scores", "score_matrix"],
        "proxy": ["proxy_scores"],
        "refine": ["corpora", *(f"refined/{name}" for name in config.refine.corpora)],
        "pack": [f"packed/{corpus}/{tokenizer}" for corpus, tokenizer in pairs],
    }
    files = {
        "reference": [storage.join(config.model_uri(config.reference.alias), "config.json")]
        if config.reference
        else [],
        "train": [storage.join(config.model_uri(name), "training.json") for name in config.students],
        "evaluate": [storage.join(config.model_uri(name), "evaluation.json") for name in config.students],
        "report": [str(config.report_folder() / "report.html")],
    }
    return all(tables.exists(spark, config.table_uri(name)) for name in made.get(stage, [])) and all(
        storage.exists(uri) for uri in files.get(stage, [])
    )


def _input_fingerprint(spark: "SparkSession", config: ExperimentConfig, stage: str) -> str:
    return fingerprint(json.loads(json.dumps(INPUTS[stage](spark, config), default=str)))


def is_unchanged(spark: "SparkSession", config: ExperimentConfig, stage: str) -> bool:
    """Whether the stage finished before with this config on these inputs, and what it made is there."""
    record = read_record(config, stage)
    if record is None or not _has_outputs(spark, config, stage):
        return False
    return bool(record["fingerprint"] == _input_fingerprint(spark, config, stage))


def _register(spark: "SparkSession", config: ExperimentConfig) -> None:
    if config.spark.schema is not None:
        register_tables(spark, config.root, config.spark.schema)


def execute(
    stage: str, run: Callable[["SparkSession", ExperimentConfig], dict[str, Any]], spark: "SparkSession",
    config: ExperimentConfig,
) -> dict[str, Any]:  # fmt: skip
    """Runs a stage and writes its record.

    The inputs are read before the stage runs: a file that arrives meanwhile makes the next run work again.
    """
    inputs = _input_fingerprint(spark, config, stage)
    # A schema that has another root's tables is refused before any work.
    _register(spark, config)
    start = time.monotonic()
    summary = run(spark, config)
    seconds = time.monotonic() - start
    _register(spark, config)
    earlier = (read_record(config, stage) or {}).get("summary", {})
    if "tokens_per_second" in summary:
        # Of its last scoring: a run that found nothing to score has no rate.
        measured = {alias: rate for alias, rate in summary["tokens_per_second"].items() if rate is not None}
        summary["tokens_per_second"] = {**earlier.get("tokens_per_second", {}), **measured}
    record = {
        "fingerprint": inputs,
        "summary": summary,
        "seconds": round(seconds, 3),
        "finished_at": time.time(),
    }
    storage.write_json(record_uri(config, stage), json.loads(json.dumps(record, default=str)))
    LOGGER.info("%s: done in %.1f s", stage, seconds)
    return summary
