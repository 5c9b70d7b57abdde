"""Held-out loss of every trained model: the `heldout` rows of `instances` in, evaluation.json and MLflow metrics out.

Each text is scored with every byte counted (`context_prefix: token`: the separator in front, nothing masked), in the
length the model was trained on: -log p(text) under that tokenization and context, so bits per byte compare across
tokenizers. Reads with delta-rs and Arrow; writes `<root>/models/<name>/evaluation.json` and the same numbers into the
model's MLflow run. A model whose weights and held-out text are unchanged is not scored again. One process; a retry
overwrites. nats_per_token = sum(nll) / sum(n_tokens); bits_per_byte = sum(nll) / (ln 2 * sum(n_bytes)).
"""

import collections
import dataclasses
import hashlib
import logging
import math
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig, ModelConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.progress import progress
from trainer.data import file_uris, open_delta, read_tokenizer_info
from trainer.targets import Target, all_targets
from trainer.tracking import tracked_run

if typing.TYPE_CHECKING:
    from miniplm_udf.scoring.description import ModelDescription

LOGGER = logging.getLogger("miniplm.trainer.evaluate")
_METHOD = 1  # raised when the meaning of a number changes, so that old evaluations are made anew
_TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out instances, in the order of their ids, and a hash of which they are."""

    rows: list[dict[str, Any]]
    fingerprint: str

    @property
    def n_bytes(self) -> int:
        return sum(row["n_bytes"] for row in self.rows)


@dataclasses.dataclass
class Totals:
    """Sums over scored instances."""

    nll_sum_nats: float = 0.0
    instance_means_nats: float = 0.0
    n_instances: int = 0
    n_tokens: int = 0
    n_bytes: int = 0

    def add(self, nll_sum_nats: float, n_tokens: int, n_bytes: int) -> None:
        self.nll_sum_nats += nll_sum_nats
        self.instance_means_nats += nll_sum_nats / n_tokens
        self.n_instances += 1
        self.n_tokens += n_tokens
        self.n_bytes += n_bytes

    def numbers(self) -> dict[str, float | int | None]:
        """The published numbers; null where nothing was scored."""
        some = self.n_instances > 0
        return {
            "heldout_nats_per_token": self.nll_sum_nats / self.n_tokens if some else None,
            "heldout_nats_per_instance_mean": self.instance_means_nats / self.n_instances if some else None,
            "heldout_bits_per_byte": self.nll_sum_nats / (math.log(2) * self.n_bytes) if some else None,
            "n_instances": self.n_instances,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
        }


def evaluate(config: ExperimentConfig) -> dict[str, Any]:
    """Evaluates the reference, where there is one, and all students.

    Returns:
        The `evaluation.json` of each model by name, with `skipped` telling whether it stood there already.

    Raises:
        CorpusError: no held-out text, or a model that is not trained yet.
    """
    targets = all_targets(config)
    for target in targets:
        _check_trained(config, target)
    heldout = read_heldout(config)
    return {target.name: _evaluate_model(config, target, heldout) for target in targets}


def plan(config: ExperimentConfig) -> dict[str, Any]:
    """What `evaluate` would do; scores and writes nothing."""
    names = [target.name for target in all_targets(config)]
    trained = [name for name in names if storage.exists(config.model_uri(f"{name}/training.json"))]
    facts = {
        "reads": storage.redact(config.table_uri("instances")),
        "models": names,
        "waits_for_training": [name for name in names if name not in trained],
    }
    if not storage.exists(storage.join(config.table_uri("instances"), "_delta_log")):
        return {**facts, "status": "waits for the ingest stage"}
    heldout = read_heldout(config)
    return {
        **facts,
        "heldout_instances": len(heldout.rows),
        "heldout_bytes": heldout.n_bytes,
    }


def read_heldout(config: ExperimentConfig) -> HeldOut:
    """The held-out instances, at most `max_instances_per_source` of a source: those with the lowest ids.

    Raises:
        CorpusError: no `instances` table, or no held-out row in it.
    """
    import pyarrow.dataset as ds

    uri = config.table_uri("instances")
    paths = file_uris(open_delta(uri, None, "ingest"))
    columns = [
        "instance_id",
        "source",
        "text",
        "segment_ends",
        "ends_document",
        "n_bytes",
    ]
    table = _dataset(paths).to_table(columns=columns, filter=ds.field("split") == "heldout") if paths else None
    if table is None or table.num_rows == 0:
        raise CorpusError(
            f"{storage.redact(uri)} holds no held-out row: raise ingest.split.heldout (now "
            f"{config.ingest.split.heldout}) and ingest into a new root, or ingest more text"
        )
    rows = _bounded(
        table.sort_by("instance_id").to_pylist(),
        config.evaluate.max_instances_per_source,
    )
    ids = "\n".join(row["instance_id"] for row in rows)
    return HeldOut(rows=rows, fingerprint=hashlib.sha256(ids.encode()).hexdigest()[:32])


def _dataset(paths: list[str]) -> Any:
    import fsspec
    import pyarrow.dataset as ds

    filesystem, _ = fsspec.core.url_to_fs(paths[0])
    inner = [fsspec.core.url_to_fs(path)[1] for path in paths]
    return ds.dataset(inner, format="parquet", filesystem=filesystem)


def _bounded(rows: Iterable[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for row in rows:
        seen[row["source"]] += 1
        if limit <= 0 or seen[row["source"]] <= limit:
            kept.append(row)
    return kept


def _check_trained(config: ExperimentConfig, target: Target) -> None:
    if not storage.exists(config.model_uri(f"{target.name}/training.json")):
        which = "--reference" if target.frozen else f"--student {target.name}"
        raise CorpusError(
            f"no trained model at {storage.redact(config.model_uri(target.name))} (expected a training.json): "
            f"run `python -m trainer train {which}` first"
        )


def _model_config(config: ExperimentConfig, target: Target, sequence_length: int) -> ModelConfig:
    tokenizer = read_tokenizer_info(config.model_uri(target.tokenizer_folder))
    return ModelConfig(
        path=config.model_uri(target.name),
        document_separator=tokenizer.document_separator,
        context_prefix="token",
        context_tokens=sequence_length,
        window_overlap_tokens=sequence_length // 4,
    )


def _evaluate_model(config: ExperimentConfig, target: Target, heldout: HeldOut) -> dict[str, Any]:
    from miniplm_udf.scoring.models import describe

    training = storage.read_json(config.model_uri(f"{target.name}/training.json"))
    model_config = _model_config(config, target, training["sequence_length"])
    description = describe(target.name, model_config)
    mark = fingerprint(_METHOD, description.model_revision, heldout.fingerprint)
    path = config.model_uri(f"{target.name}/evaluation.json")
    before = storage.read_json(path)
    if before is not None and before.get("fingerprint") == mark:
        LOGGER.info("%s is evaluated on this text: nothing to do", target.name)
        return {**before, "skipped": True}
    found = {
        **_score(config, target, model_config, description, heldout),
        "fingerprint": mark,
    }
    with tracked_run(config, target.name, training["run_id"]) as run:
        run.log_metrics(_metrics(found))
        run.set_tags({"heldout_fingerprint": heldout.fingerprint})
    storage.write_json(path, found)
    return {**found, "skipped": False}


def _score(
    config: ExperimentConfig,
    target: Target,
    model_config: ModelConfig,
    description: "ModelDescription",
    heldout: HeldOut,
) -> dict[str, Any]:
    """Scores all held-out texts with one model."""
    import torch

    from miniplm_udf.scoring.models import load_model, resolve
    from miniplm_udf.scoring.scorer import Score, Scorer
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_config, description, device)
    tokenizer = load_tokenizer(resolve(model_config))
    scorer = Scorer(model, tokenizer, description, config.evaluate.tokens_per_batch, device)
    whole, failed = Totals(), collections.Counter[str]()
    by_source: dict[str, Totals] = collections.defaultdict(Totals)
    with progress(f"evaluate {target.name}", total=heldout.n_bytes, unit="byte") as shown:
        for rows in _slices(heldout.rows, _TEXTS_AT_ONCE):
            results = scorer.score(*([row[key] for row in rows] for key in ("text", "segment_ends", "ends_document")))
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Score):
                    for totals in (whole, by_source[row["source"]]):
                        totals.add(result.nll_sum_nats, result.n_tokens, result.n_bytes)
                else:
                    failed[result.reason] += 1
            shown.update(sum(row["n_bytes"] for row in rows))
    if failed:
        LOGGER.warning(
            "%s: %d held-out texts could not be scored: %s",
            target.name,
            failed.total(),
            dict(failed),
        )
    if not whole.n_instances:
        raise CorpusError(f"{target.name}: none of {len(heldout.rows)} held-out texts could be scored: {dict(failed)}")
    sources = {source: by_source[source].numbers() for source in sorted(by_source)}
    return {**whole.numbers(), "failed": dict(failed), "by_source": sources}


def _slices(rows: Sequence[dict[str, Any]], size: int) -> Iterable[Sequence[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    names = (
        "heldout_nats_per_token",
        "heldout_nats_per_instance_mean",
        "heldout_bits_per_byte",
    )
    metrics = {name: found[name] for name in names}
    for source, numbers in found["by_source"].items():
        # MLflow takes letters, digits and _-./ : space in names alone.
        name = "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in source)
        metrics[f"heldout_bits_per_byte/{name}"] = numbers["heldout_bits_per_byte"]
    return metrics
