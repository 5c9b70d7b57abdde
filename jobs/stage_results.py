"""Functions of stage summaries: numbers for `summary.json`, rates, values of the last run, refusals.

Input: the summary of one stage, as a dataclass. Output: numbers, or a CorpusError. `stages.py` says which function
belongs to which stage. Driver only; reads the models' `training.json`, and no table.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.report.summary import PipelineSummary
from miniplm_udf.store.model_records import read_training

if TYPE_CHECKING:
    from jobs.proxy import ProxySummary
    from jobs.refine import RefineSummary
    from miniplm_udf.generation.run import GenerationSummary
    from miniplm_udf.ingestion.summary import IngestSummary
    from miniplm_udf.scores.summary import ScoreSummary


def ingest_numbers(config: ExperimentConfig, summary: "IngestSummary") -> PipelineSummary:
    """Returns the counts of instances and rejects.

    Args:
        config: the experiment.
        summary: of the stage `ingest`.
    """
    return {"instances": summary.instances, "rejected": summary.rejected}


def check_heldout(config: ExperimentConfig, summary: "IngestSummary") -> None:
    """Refuses, before hours of training, a corpus that leaves nothing to evaluate on.

    Args:
        config: the experiment.
        summary: of the stage `ingest`.

    Raises:
        CorpusError: there are students and a share of held-out documents, and no document fell into it.
    """
    if config.students and config.ingest.split.heldout > 0 and not summary.by_split.get("heldout"):
        raise CorpusError(
            f"ingest: expected held-out documents to evaluate the students on, found none: {summary.instances} "
            f"instances, ingest.split.heldout {config.ingest.split.heldout}; ingest more text, or set a larger share "
            "and a new root (a share of 0 leaves out the evaluation)"
        )


def score_numbers(config: ExperimentConfig, summary: "ScoreSummary") -> PipelineSummary:
    """Returns the counts of scored instances and rejects, and the rates.

    Args:
        config: the experiment.
        summary: of the stage `score`.
    """
    rates = summary.tokens_per_second
    return {"scored": summary.scored, "tokens_per_second": rates, "rejected": summary.rejected}


def with_earlier_rates(earlier: "ScoreSummary | None", summary: "ScoreSummary") -> "ScoreSummary":
    """Keeps the rates of the last scoring: a run that found nothing to score has no rate.

    Args:
        earlier: the summary in the record of the stage; None if the stage never finished.
        summary: the new summary.

    Returns:
        The new summary, in which `tokens_per_second` has the earlier rate of every model without a new one.
    """
    measured = {alias: rate for alias, rate in summary.tokens_per_second.items() if rate is not None}
    last = earlier.tokens_per_second if earlier is not None else {}
    return dataclasses.replace(summary, tokens_per_second={**last, **measured})


def score_rates(config: ExperimentConfig, summary: PipelineSummary) -> dict[str, float]:
    """Returns the rate of each scored model that was measured.

    Args:
        config: the experiment.
        summary: over all stages.
    """
    return {alias: rate for alias, rate in summary["tokens_per_second"].items() if rate}


def proxy_numbers(config: ExperimentConfig, summary: "ProxySummary") -> PipelineSummary:
    """Returns the count of predicted instances, and the correlation of predictions and scores.

    Args:
        config: the experiment.
        summary: of the stage `proxy`.
    """
    return {"proxy": {"predicted": summary.rows.pool, "spearman": summary.heldout.spearman}}


def refine_numbers(config: ExperimentConfig, summary: "RefineSummary") -> PipelineSummary:
    """Returns the counts of kept instances, and the places and versions of the corpora.

    Args:
        config: the experiment; the paths are under its root, which may have been moved since the record was written.
        summary: of the stage `refine`.
    """
    paths = {name: storage.redact(config.layout.refined(name)) for name in summary.refined}
    pairs = {name: pair for name, version in summary.refined.items() if (pair := version.diagnostics.get("pair"))}
    return {
        "kept": summary.kept,
        "pairs": pairs,
        "refined": {
            name: {"path": paths[name], "version": version.version, "candidates": version.n_candidates}
            for name, version in summary.refined.items()
        },
    }


def generate_numbers(config: ExperimentConfig, summary: "GenerationSummary") -> PipelineSummary:
    """Returns the counts of continued instances and rejects.

    Args:
        config: the experiment.
        summary: of the stage `generate`.
    """
    return {"generated": summary.generated, "rejected": summary.rejected}


def reference_rates(config: ExperimentConfig, summary: PipelineSummary) -> dict[str, float]:
    """Returns the rate of the reference's training, by its alias.

    Args:
        config: the experiment.
        summary: over all stages; not used.
    """
    return _training_rates(config, [config.reference.alias] if config.reference else [])


def student_rates(config: ExperimentConfig, summary: PipelineSummary) -> dict[str, float]:
    """Returns the rates of the students' trainings, by name.

    Args:
        config: the experiment.
        summary: over all stages; not used.
    """
    return _training_rates(config, config.students)


def _training_rates(config: ExperimentConfig, names: Iterable[str]) -> dict[str, float]:
    trainings = {name: read_training(config, name) for name in names}
    return {name: each.tokens / each.seconds for name, each in trainings.items() if each and each.seconds}
