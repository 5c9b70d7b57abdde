"""The sentence behind exit code 3: which stage rejected too many rows, why, and which key of the config says so.

Input: the summary of a stage, and the table `rejects`, whose files are read without Spark. Output: a sentence for
stderr. Driver only; writes nothing.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.store.delta_files import parquet_files

_ADVICE = {
    "ingest": "correct the input and ingest it under new file names",
    "score": "check these texts, the models and their settings",
    "generate": "check these texts, the model and its settings",
}


def reject_sentence(stage: str, config: ExperimentConfig, summary: Any) -> str | None:
    """Returns the sentence for a stage that has rejected more rows than the config allows.

    Args:
        stage: name of the stage.
        config: the experiment.
        summary: the summary of the stage.

    Returns:
        The sentence; None if the stage has not rejected too many.
    """
    if not getattr(summary, "too_many_rejects", False):
        return None
    # Only `ingest` has a limit of its own.
    section, key = (config.ingest, "ingest") if stage == "ingest" else (config.score, "score")
    reasons = getattr(summary, "rejects_by_reason", None) or _reasons(config, stage)
    if unreadable := getattr(summary, "unreadable_files", None):
        reasons = {**reasons, "rows of unreadable files": sum(unreadable.values())}
    n_rejected = getattr(summary, "rejected", None)
    key = f"{key}.max_reject_share"
    return (
        f"{over_limit(stage, n_rejected, reasons, key, section.max_reject_share)}; the table rejects has each row with "
        f"its reason: {_ADVICE.get(stage, _ADVICE['score'])}, or raise {key}"
    )


def over_limit(stage: str, n_rejected: int | None, reasons: Mapping[str, int], key: str, limit: float) -> str:
    """Returns the sentence about too many rejects.

    Args:
        stage: name of the stage.
        n_rejected: number of rejects; None leaves it out.
        reasons: rejects by reason; empty if they are not known.
        key: key of the config that sets the limit.
        limit: the limit, a share of the rows.
    """
    shown = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]) if n)
    count = "rejects" if n_rejected is None else f"{n_rejected:,} rejects"
    return f"exit code 3: {stage}: {count}{f' ({shown})' if shown else ''} are more than {key}={limit:g} allows"


def _reasons(config: ExperimentConfig, stage: str) -> Counter[str]:
    """Counts the rejects of a scoring stage by reason; empty if the table cannot be read without Spark."""
    import pyarrow.dataset

    try:
        files = parquet_files(config.layout.table("rejects"))
        rows = pyarrow.dataset.dataset(files).to_table(columns=["stage", "reason"])
    except Exception:  # a sentence without reasons is better than an error after a stage that is done
        return Counter()
    kind = "generate" if stage == "generate" else "score"
    names = zip(rows["stage"].to_pylist(), rows["reason"].to_pylist(), strict=True)
    return Counter(reason for name, reason in names if name.partition(":")[0] == kind)
