"""The summary over all stages: `summary.json`, and the table that ends `miniplm run`. Driver only; reads no table.

Inputs: the stages' records (records.py), the models' `training.json` and `evaluation.json`. Outputs: a dict with the
keys that others rely on, and lines of text. A rerun that skipped everything gives the same summary.
"""

from collections.abc import Sequence
from typing import Any

from jobs.records import STAGES, read_record
from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig

_HELDOUT = ("heldout_nats_per_token", "heldout_bits_per_byte")


def build_summary(config: ExperimentConfig) -> dict[str, Any]:
    """Counts, rates and seconds of all stages that have run, and the students' held-out numbers.

    Returns:
        `instances`, `rejected` (all stages), `scored` (per model alias), `proxy` (`predicted`, held-out `spearman`;
        null where there is none), `kept` (per corpus), `tokens_per_second` (per model alias, of its last scoring),
        `refined` (per corpus: `path`, `version`), `students` (per name), `seconds` (per stage, of its last run).
    """
    records = {stage: record for stage in STAGES if (record := read_record(config, stage))}
    stages = ("ingest", "score", "proxy", "refine")
    ingest, score, proxy, refine = (records.get(stage, {}).get("summary", {}) for stage in stages)
    evaluations = {name: _model_file(config, name, "evaluation.json") for name in config.students}
    return {
        "instances": ingest.get("instances", 0),
        "rejected": ingest.get("rejected", 0) + score.get("rejected", 0),
        "scored": score.get("scored", {}),
        "proxy": {"predicted": proxy["rows"]["pool"], "spearman": proxy["heldout"]["spearman"]} if proxy else None,
        "kept": refine.get("kept", {}),
        "tokens_per_second": score.get("tokens_per_second", {}),
        "refined": {
            name: {"path": corpus["path"], "version": corpus["version"]}
            for name, corpus in refine.get("refined", {}).items()
        },
        "students": {name: {key: found[key] for key in _HELDOUT} for name, found in evaluations.items() if found},
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
    }


def write_summary(config: ExperimentConfig, summary: dict[str, Any]) -> None:
    storage.write_json(str(config.report_folder() / "summary.json"), summary)


def summary_text(config: ExperimentConfig, summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    counts = [
        ("instances in", f"{summary['instances']:,}"),
        ("rejected", f"{summary['rejected']:,}"),
        *((f"scored by {alias}", f"{n:,}") for alias, n in summary["scored"].items()),
        *([("predicted by the proxy", _predicted(summary["proxy"]))] if summary["proxy"] else []),
        *((f"kept in {name}", f"{n:,}") for name, n in summary["kept"].items()),
    ]
    speeds = [
        (stage, f"{summary['seconds'][stage]:,.1f} s", _speeds(config, summary, stage))
        for stage in STAGES
        if stage in summary["seconds"]
    ]
    students = [
        (name, config.students[name].corpus, *(f"{found[key]:.4f}" for key in _HELDOUT))
        for name, found in summary["students"].items()
    ]
    root = storage.redact(config.root)
    folder = config.report_folder()
    places = [
        ("tables", f"{root}/tables/{{instances,scores,score_matrix,rejects,corpora}}"),
        *(
            (f"corpus {name}", f"{found['path']} (version {found['version']})")
            for name, found in summary["refined"].items()
        ),
        ("summary", str(folder / "summary.json")),
        ("report", str(folder / "report.html")),
        ("MLflow", f"mlflow ui --backend-store-uri {storage.redact(config.mlflow_uri())}"),
    ]
    parts = [_table(counts), _table([("stage", "took", "tokens per second"), *speeds])]
    if students:
        parts.append(_table([("student", "corpus", "held-out nats/token", "bits/byte"), *students]))
    return "\n\n".join([*parts, _table(places)])


def _predicted(proxy: dict[str, Any]) -> str:
    rho = proxy["spearman"]
    return f"{proxy['predicted']:,} (Spearman on held-out instances {'none' if rho is None else format(rho, '.3f')})"


def _speeds(config: ExperimentConfig, summary: dict[str, Any], stage: str) -> str:
    """`name rate` of each model that the stage ran."""
    if stage == "score":
        rates = {alias: rate for alias, rate in summary["tokens_per_second"].items() if rate}
    elif stage in ("reference", "train"):
        names = [config.reference.alias] if stage == "reference" and config.reference else list(config.students)
        found = {name: _model_file(config, name, "training.json") for name in names}
        rates = {name: t["tokens"] / t["seconds"] for name, t in found.items() if t and t.get("seconds")}
    else:
        rates = {}
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())


def _model_file(config: ExperimentConfig, name: str, file: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = storage.read_json(storage.join(config.model_uri(name), file))
    return found


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
