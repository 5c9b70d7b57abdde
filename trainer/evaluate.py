"""Held-out loss of every trained model, from the `heldout` rows of `instances`.

Each text is scored with `context_prefix: token`: the separator stands in front, and every byte counts. Windows have the
length that the model was trained on. So bits per byte can be compared between tokenizers:
nats_per_token = sum(nll) / sum(n_tokens); bits_per_byte = sum(nll) / (ln 2 * sum(n_bytes)).

Reads with delta-rs and Arrow. Writes `<root>/models/<name>/evaluation.json`, and the same numbers to the model's MLflow
run. A model is skipped while its weights and the held-out text are unchanged. Runs in one process; a retry overwrites.
"""

import collections
import dataclasses
import hashlib
import logging
import math
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.progress import progress
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_files
from trainer.data import open_delta, read_tokenizer_info
from trainer.metric_names import safe_names
from trainer.records import (
    EVALUATION_FILE,
    TRAINING_FILE,
    EvaluateResult,
    Evaluation,
    HeldOutLoss,
    TrainingRecord,
    read_evaluation,
    read_training,
)
from trainer.targets import Target, all_targets
from trainer.tracking import tracked_run

if typing.TYPE_CHECKING:
    from miniplm_udf.scoring.description import ModelDescription
    from miniplm_udf.scoring.scorer import Scorer

LOGGER = logging.getLogger("miniplm.trainer.evaluate")
_METHOD = 1  # raise it when the meaning of a number changes: models are then evaluated again
_TEXTS_AT_ONCE = 256


class HeldOutRow(TypedDict):
    """A held-out instance: the columns of `instances` that are read."""

    instance_id: str
    source: str
    text: str
    segment_ends: list[int]
    ends_document: bool
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out instances.

    Attributes:
        rows: one per instance, sorted by `instance_id`.
        fingerprint: hash of their ids, 32 hexadecimal digits.
    """

    rows: list[HeldOutRow]
    fingerprint: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all texts."""
        return sum(row["n_bytes"] for row in self.rows)


@dataclasses.dataclass
class Totals:
    """Sums over scored instances; `instance_means_nats` sums the instances' nats per token."""

    nll_sum_nats: float = 0.0
    instance_means_nats: float = 0.0
    n_instances: int = 0
    n_tokens: int = 0
    n_bytes: int = 0

    def add(self, nll_sum_nats: float, n_tokens: int, n_bytes: int) -> None:
        """Adds one scored instance.

        Args:
            nll_sum_nats: sum of -log p over its tokens.
            n_tokens: scored tokens, at least 1.
            n_bytes: UTF-8 bytes of its text.
        """
        self.nll_sum_nats += nll_sum_nats
        self.instance_means_nats += nll_sum_nats / n_tokens
        self.n_instances += 1
        self.n_tokens += n_tokens
        self.n_bytes += n_bytes

    def loss(self) -> HeldOutLoss:
        """The means of these sums."""
        some = self.n_instances > 0
        return HeldOutLoss(
            heldout_nats_per_token=self.nll_sum_nats / self.n_tokens if some else None,
            heldout_nats_per_instance_mean=self.instance_means_nats / self.n_instances if some else None,
            heldout_bits_per_byte=self.nll_sum_nats / (math.log(2) * self.n_bytes) if some else None,
            n_instances=self.n_instances,
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
        )


def evaluate(config: ExperimentConfig) -> dict[str, EvaluateResult]:
    """Evaluates all students, and the reference if the experiment trains one.

    Args:
        config: the experiment.

    Returns:
        The result of each model, by name.

    Raises:
        CorpusError: there is no held-out text, or a model is not trained yet.
    """
    trainings = [(target, _training(config, target)) for target in all_targets(config)]
    # A second process waits for the first one, and then skips every model.
    with Lease(config.layout.lease("evaluate"), "evaluate", waits=True, what="evaluation"):
        heldout = read_heldout(config)
        return {target.name: _evaluate_model(config, target, training, heldout) for target, training in trainings}


def plan(config: ExperimentConfig) -> Json:
    """Returns the plan of `evaluate` for a dry run; writes nothing.

    Args:
        config: the experiment.

    Returns:
        `reads` (the table), `models`, `waits_for_training` (models without a training), and `heldout_instances` and
        `heldout_bytes`, or `status` if there is no table.
    """
    names = [target.name for target in all_targets(config)]
    trained = [name for name in names if storage.exists(config.layout.model(name, TRAINING_FILE))]
    facts = {
        "reads": storage.redact(config.layout.table("instances")),
        "models": names,
        "waits_for_training": [name for name in names if name not in trained],
    }
    if not storage.exists(storage.join(config.layout.table("instances"), "_delta_log")):
        return {**facts, "status": "waits for the ingest stage"}
    heldout = read_heldout(config)
    return {
        **facts,
        "heldout_instances": len(heldout.rows),
        "heldout_bytes": heldout.n_bytes,
    }


def read_heldout(config: ExperimentConfig) -> HeldOut:
    """Reads the held-out instances.

    Args:
        config: the experiment. `evaluate.max_instances_per_source` limits the instances per source; the instances with
            the lowest ids are taken.

    Returns:
        The instances, sorted by id.

    Raises:
        CorpusError: there is no `instances` table, or it has no held-out row.
    """
    import pyarrow.dataset as ds

    uri = config.layout.table("instances")
    paths = delta_files.files_of(open_delta(uri, None, "ingest"), uri)
    columns = list(HeldOutRow.__annotations__)
    table = _dataset(paths).to_table(columns=columns, filter=ds.field("split") == "heldout") if paths else None
    if table is None or table.num_rows == 0:
        raise CorpusError(
            f"{storage.redact(uri)} has no held-out row: raise ingest.split.heldout (now "
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


def _bounded(rows: Iterable[HeldOutRow], limit: int) -> list[HeldOutRow]:
    """The first `limit` rows of each source; all rows if the limit is not above 0."""
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for row in rows:
        counts[row["source"]] += 1
        if limit <= 0 or counts[row["source"]] <= limit:
            kept.append(row)
    return kept


def _training(config: ExperimentConfig, target: Target) -> TrainingRecord:
    """The record of a trained model.

    Raises:
        CorpusError: the model is not trained.
    """
    training = read_training(config, target.name)
    if training is None:
        option = "--reference" if target.frozen else f"--student {target.name}"
        raise CorpusError(
            f"no trained model at {storage.redact(config.layout.model(target.name))} (expected a {TRAINING_FILE} with "
            f"all keys): run `python -m trainer train {option}` first"
        )
    return training


def _model_config(config: ExperimentConfig, target: Target, sequence_length: int) -> ModelConfig:
    """How the scorer loads and windows the model; windows overlap by a quarter of the training length."""
    tokenizer = read_tokenizer_info(config.layout.model(target.tokenizer_folder))
    return ModelConfig(
        path=config.layout.model(target.name),
        document_separator=tokenizer.document_separator,
        context_prefix="token",
        context_tokens=sequence_length,
        window_overlap_tokens=sequence_length // 4,
    )


def _evaluate_model(
    config: ExperimentConfig, target: Target, training: TrainingRecord, heldout: HeldOut
) -> EvaluateResult:
    """Evaluates one model, or returns its `evaluation.json` if nothing has changed since."""
    from miniplm_udf.scoring.models import describe

    model_config = _model_config(config, target, training.sequence_length)
    description = describe(target.name, model_config)
    current_fingerprint = fingerprint(_METHOD, description.model_revision, heldout.fingerprint)
    previous = read_evaluation(config, target.name)
    if previous is not None and previous.fingerprint == current_fingerprint:
        LOGGER.info("%s is already evaluated on this text: skipped", target.name)
        return EvaluateResult(previous, skipped=True)
    loss, failed, by_source = _score(config, target, model_config, description, heldout)
    evaluation = Evaluation(
        **dataclasses.asdict(loss), failed=failed, by_source=by_source, fingerprint=current_fingerprint
    )
    # The file comes first: it has the true names of the sources, and does not depend on MLflow.
    storage.write_json(config.layout.model(target.name, EVALUATION_FILE), dataclasses.asdict(evaluation))
    with tracked_run(config, target.name, training.run_id) as run:
        run.log_metrics(_metrics(evaluation))
        run.set_tags({"heldout_fingerprint": heldout.fingerprint})
    return EvaluateResult(evaluation, skipped=False)


def _score(
    config: ExperimentConfig,
    target: Target,
    model_config: ModelConfig,
    description: "ModelDescription",
    heldout: HeldOut,
) -> tuple[HeldOutLoss, dict[str, int], dict[str, HeldOutLoss]]:
    """Scores all held-out texts with one model.

    Returns:
        (loss over all instances, failed instances by reason, loss by source).

    Raises:
        CorpusError: no text could be scored.
    """
    from miniplm_udf.scoring.results import Score

    scorer = _make_scorer(config, model_config, description)
    overall, failed = Totals(), collections.Counter[str]()
    by_source: dict[str, Totals] = collections.defaultdict(Totals)
    with progress(f"evaluate {target.name}", total=heldout.n_bytes, unit="byte") as shown:
        for rows in _slices(heldout.rows, _TEXTS_AT_ONCE):
            texts, segment_ends = [row["text"] for row in rows], [row["segment_ends"] for row in rows]
            results = scorer.score(texts, segment_ends, [row["ends_document"] for row in rows])
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Score):
                    for totals in (overall, by_source[row["source"]]):
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
    if not overall.n_instances:
        raise CorpusError(f"{target.name}: none of {len(heldout.rows)} held-out texts could be scored: {dict(failed)}")
    return overall.loss(), dict(failed), {source: by_source[source].loss() for source in sorted(by_source)}


def _make_scorer(config: ExperimentConfig, model_config: ModelConfig, description: "ModelDescription") -> "Scorer":
    """The scorer of one model, on the GPU if there is one."""
    import torch

    from miniplm_udf.scoring.models import load_model, model_folder
    from miniplm_udf.scoring.scorer import Scorer
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_config, description, device)
    tokenizer = load_tokenizer(model_folder(model_config))
    return Scorer(model, tokenizer, description, config.evaluate.tokens_per_batch, device)


def _slices(rows: Sequence[HeldOutRow], size: int) -> Iterable[Sequence[HeldOutRow]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    """The numbers as MLflow metrics: three over all instances, and bits per byte by source."""
    metrics = {
        "heldout_nats_per_token": evaluation.heldout_nats_per_token,
        "heldout_nats_per_instance_mean": evaluation.heldout_nats_per_instance_mean,
        "heldout_bits_per_byte": evaluation.heldout_bits_per_byte,
    }
    names = safe_names(evaluation.by_source)
    for source, loss in evaluation.by_source.items():
        metrics[f"heldout_bits_per_byte/{names[source]}"] = loss.heldout_bits_per_byte
    return {name: value for name, value in metrics.items() if value is not None}
