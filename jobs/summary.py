"""The summary over all stages: `summary.json`, and the table that ends `miniplm run`. Driver only; reads no table.

Inputs: the stages' records (records.py), the models' `training.json` and `evaluation.json`. Outputs: a dict whose keys
are public, and lines of text. A rerun that skipped everything gives the same summary.
"""

import shlex

from jobs.evaluation_text import evaluation_tables
from jobs.records import read_record
from jobs.stages import STAGES
from jobs.text import table
from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.report.summary import PipelineSummary, ProxyNumbers
from miniplm_udf.storage import Json

# Public key: key of the losses of the set `heldout` in evaluation.json.
_HELDOUT = {"heldout_nats_per_token": "nats_per_token", "heldout_bits_per_byte": "bits_per_byte"}


def build_summary(config: ExperimentConfig) -> PipelineSummary:
    """Counts, rates and seconds of all stages that have run, and the students' held-out numbers.

    Args:
        config: the experiment.

    Returns:
        The summary, with all its keys.
    """
    records = {stage.name: record for stage in STAGES if (record := read_record(config, stage.name))}
    names = ("ingest", "score", "proxy", "refine", "generate")
    ingest, score, proxy, refine, generate = (records[name]["summary"] if name in records else {} for name in names)
    evaluations = {name: _model_file(config, name, "evaluation.json") for name in config.students}
    return {
        "instances": ingest.get("instances", 0),
        "rejected": sum(stage.get("rejected", 0) for stage in (ingest, score, generate)),
        "scored": score.get("scored", {}),
        "proxy": {"predicted": proxy["rows"]["pool"], "spearman": proxy["heldout"]["spearman"]} if proxy else None,
        "generated": generate.get("generated"),
        "kept": refine.get("kept", {}),
        "tokens_per_second": score.get("tokens_per_second", {}),
        "refined": {
            # Under the present root: it may have been moved since the record was written.
            name: {"path": storage.redact(config.layout.table(f"refined/{name}")), "version": corpus["version"]}
            for name, corpus in refine.get("refined", {}).items()
        },
        "students": {name: losses for name in config.students if (losses := _heldout(evaluations[name]))},
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
    }


def write_summary(config: ExperimentConfig, summary: PipelineSummary) -> None:
    """Writes the summary as `summary.json` in the report folder.

    Args:
        config: the experiment, whose report folder is local.
        summary: the result of `build_summary`.
    """
    storage.write_json(str(config.report_folder() / "summary.json"), summary)


def summary_text(config: ExperimentConfig, summary: PipelineSummary) -> str:
    """Returns the summary as text for a terminal.

    Args:
        config: the experiment.
        summary: the result of `build_summary`.
    """
    counts = [
        ("instances in", f"{summary['instances']:,}"),
        ("rejected", f"{summary['rejected']:,}"),
        *((f"scored by {alias}", f"{n:,}") for alias, n in summary["scored"].items()),
        *([("predicted by the proxy", _predicted(summary["proxy"]))] if summary["proxy"] else []),
        *((f"kept in {name}", f"{n:,}") for name, n in summary["kept"].items()),
        *([("generated", f"{summary['generated']:,}")] if summary["generated"] is not None else []),
    ]
    speeds = [
        (stage.name, f"{summary['seconds'][stage.name]:,.1f} s", _speeds(config, summary, stage.name))
        for stage in STAGES
        if stage.name in summary["seconds"]
    ]
    students = [
        (name, config.students[name].corpus, *(_decimal(losses[key]) for key in _HELDOUT))
        for name, losses in summary["students"].items()
    ]
    root = storage.redact(config.root)
    folder = config.report_folder()
    places = [
        ("tables", f"{root}/tables/{{instances,scores,score_matrix,rejects,corpora}}"),
        *(
            (f"corpus {name}", f"{corpus['path']} (version {corpus['version']})")
            for name, corpus in summary["refined"].items()
        ),
        ("summary", str(folder / "summary.json")),
        ("report", str(folder / "report.html")),
        ("MLflow", mlflow_command(config)),
    ]
    parts = [table(None, counts, "  "), table(("stage", "took", "tokens per second"), speeds, "  ")]
    if students:
        parts.append(table(("student", "corpus", "held-out nats/token", "bits/byte"), students, "  "))
    evaluations = {name: each for name in config.students if (each := _model_file(config, name, "evaluation.json"))}
    if any(each.get("tasks") or each.get("sets", {}).keys() - {HELDOUT} for each in evaluations.values()):
        parts.append(evaluation_tables(evaluations))
    return "\n\n".join([*parts, table(None, places, "  ")])


def mlflow_command(config: ExperimentConfig) -> str:
    """The shell command that shows the experiment's runs, quoted so that it can be pasted into a terminal."""
    return shlex.join(["mlflow", "ui", "--backend-store-uri", storage.redact(config.mlflow_uri())])


def _heldout(evaluation: Json | None) -> dict[str, float | None] | None:
    """The public losses on held-out text; None if the student was not evaluated on it."""
    losses = (evaluation or {}).get("sets", {}).get(HELDOUT)
    return losses and {public: losses[key] for public, key in _HELDOUT.items()}


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _predicted(proxy: ProxyNumbers) -> str:
    rho = proxy["spearman"]
    return f"{proxy['predicted']:,} (Spearman on held-out instances {'none' if rho is None else format(rho, '.3f')})"


def _speeds(config: ExperimentConfig, summary: PipelineSummary, stage: str) -> str:
    """`NAME RATE` for each model that the stage ran, in tokens per second."""
    if stage == "score":
        rates = {alias: rate for alias, rate in summary["tokens_per_second"].items() if rate}
    elif stage in ("reference", "train"):
        names = [config.reference.alias] if stage == "reference" and config.reference else list(config.students)
        trainings = {name: _model_file(config, name, "training.json") for name in names}
        rates = {name: t["tokens"] / t["seconds"] for name, t in trainings.items() if t and t.get("seconds")}
    else:
        rates = {}
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())


def _model_file(config: ExperimentConfig, name: str, file: str) -> Json | None:
    record: Json | None = storage.read_json(config.layout.model(name, file))
    return record
