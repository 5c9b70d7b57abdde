"""The summary over all stages: `summary.json`, and the table that ends `miniplm run`. Driver only; reads no table.

Inputs: the stages' records (records.py), the models' `training.json` and `evaluation.json`. Outputs: a dict whose keys
are public, and lines of text. A rerun that skipped everything gives the same summary.
"""

import shlex
from collections.abc import Mapping

from jobs.evaluation_text import evaluation_text
from jobs.stage import Options
from jobs.stages import STAGES
from jobs.text import decimal, table
from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.report.summary import PipelineSummary, ProxyNumbers
from miniplm_udf.store.model_records import Evaluation, read_evaluation
from miniplm_udf.store.provenance import PairNumbers


def build_summary(config: ExperimentConfig) -> PipelineSummary:
    """Counts, rates and seconds of all stages that have run, and the students' held-out numbers.

    Args:
        config: the experiment.

    Returns:
        The summary, with all its keys.
    """
    evaluations = {name: read_evaluation(config, name) for name in config.students}
    summary: PipelineSummary = {
        "instances": 0,
        "rejected": 0,
        "scored": {},
        "proxy": None,
        "generated": None,
        "kept": {},
        "tokens_per_second": {},
        "refined": {},
        "pairs": {},
        "students": {name: losses for name in config.students if (losses := _heldout(evaluations[name]))},
        "seconds": {},
    }
    for stage in STAGES:
        if record := stage.record(config):
            numbers = stage.numbers(config, record.summary)
            rejected = summary["rejected"] + numbers.get("rejected", 0)
            seconds = {**summary["seconds"], stage.name: record.seconds}
            summary = {**summary, **numbers, "rejected": rejected, "seconds": seconds}
    return summary


def write_summary(config: ExperimentConfig, summary: PipelineSummary) -> None:
    """Writes the summary as `summary.json` in the report folder.

    Args:
        config: the experiment.
        summary: the result of `build_summary`.
    """
    storage.write_json(config.report_file("summary.json"), summary)


def summary_text(config: ExperimentConfig, summary: PipelineSummary, options: Options) -> str:
    """Returns the summary as text for a terminal.

    Args:
        config: the experiment.
        summary: the result of `build_summary`.
        options: the options of the command line, which the next commands need too.
    """
    counts = [
        ("instances in", f"{summary['instances']:,}"),
        ("rejected", f"{summary['rejected']:,}"),
        *((f"scored by {alias}", f"{n:,}") for alias, n in summary["scored"].items()),
        *([("predicted by the proxy", _predicted(summary["proxy"]))] if summary["proxy"] else []),
        *((f"kept in {name}", _kept(summary, name)) for name in summary["kept"]),
        *([("generated", f"{summary['generated']:,}")] if summary["generated"] is not None else []),
    ]
    speeds = [
        (stage.name, f"{summary['seconds'][stage.name]:,.1f} s", _speeds(stage.rates(config, summary)))
        for stage in STAGES
        if stage.name in summary["seconds"]
    ]
    students = [
        (name, config.students[name].corpus, *map(decimal, losses.values()))
        for name, losses in summary["students"].items()
    ]
    places = {
        "tables": storage.redact(config.layout.table("{instances,scores,score_matrix,rejects,corpora}")),
        **{
            f"corpus {name}": f"{corpus['path']} (version {corpus['version']})"
            for name, corpus in summary["refined"].items()
        },
        "summary": storage.redact(config.report_file("summary.json")),
        "report": storage.redact(config.report_file("report.html")),
        "MLflow": mlflow_command(config),
        **_next_commands(summary, options),
        **_local_store(config),
    }
    parts = [table(None, counts, "  "), table(("stage", "took", "tokens per second"), speeds, "  ")]
    if summary["pairs"]:
        parts.append(_pairs_text(summary["pairs"]))
    if students:
        parts.append(table(("student", "corpus", "held-out nats/token", "bits/byte"), students, "  "))
    evaluations = {name: each for name in config.students if (each := read_evaluation(config, name))}
    if any(each.tasks or each.sets.keys() - {HELDOUT} for each in evaluations.values()):
        parts.append(evaluation_text(evaluations))
    return "\n\n".join([*parts, table(None, list(places.items()), "  ")])


def _kept(summary: PipelineSummary, name: str) -> str:
    kept, corpus = summary["kept"][name], summary["refined"].get(name)
    return f"{kept:,} of the {corpus['candidates']:,} that pass `where`" if corpus else f"{kept:,}"


def _next_commands(summary: PipelineSummary, options: Options) -> dict[str, str]:
    """The commands that show and hand over the result, ready to be pasted into a terminal."""
    config = shlex.join(["-c", options.config_path, *options.overrides])
    commands: dict[str, str] = {}
    if names := list(summary["refined"]):
        commands["texts"] = f"miniplm inspect {names[0]} --highest {config}"
        commands["for another trainer"] = f"miniplm export {names[0]} --to jsonl {config}"
    if summary["students"]:
        commands["students"] = f"miniplm compare {config}"
    return commands


def mlflow_command(config: ExperimentConfig) -> str:
    """The shell command that shows the experiment's runs, quoted so that it can be pasted into a terminal."""
    return shlex.join(mlflow_arguments(config))


def mlflow_arguments(config: ExperimentConfig) -> list[str]:
    """The words of the command that shows the experiment's runs."""
    return ["mlflow", "ui", "--backend-store-uri", storage.redact(config.mlflow_uri())]


def _local_store(config: ExperimentConfig) -> dict[str, str]:
    """The folder of MLflow's default store, if it is not next to the tables."""
    if storage.is_local(config.root) or config.artifact_uri() is None:
        return {}
    return {"on this machine": f"{config.local_folder()} (runs of MLflow; mlflow.tracking_uri can name a server)"}


def _pairs_text(pairs: Mapping[str, PairNumbers]) -> str:
    """A row for each corpus: its score compared with the losses of the two models."""
    header = ("corpus", "Spearman with -teacher", "with reference", "spread teacher", "reference", "unit")
    rows = [
        (
            name,
            decimal(pair["spearman_with_minus_teacher_loss"]),
            decimal(pair["spearman_with_reference_loss"]),
            decimal(pair["spread"][pair["teacher"]]),
            decimal(pair["spread"][pair["reference"]]),
            pair["spread_unit"],
        )
        for name, pair in pairs.items()
    ]
    return table(header, rows, "  ")


def _heldout(evaluation: Evaluation | None) -> dict[str, float | None] | None:
    """The public losses on held-out text; None if the student was not evaluated on it."""
    losses = evaluation.sets.get(HELDOUT) if evaluation else None
    if losses is None:
        return None
    return {"heldout_nats_per_token": losses.nats_per_token, "heldout_bits_per_byte": losses.bits_per_byte}


def _predicted(proxy: ProxyNumbers) -> str:
    rho = proxy["spearman"]
    return f"{proxy['predicted']:,} (Spearman on held-out instances {'none' if rho is None else format(rho, '.3f')})"


def _speeds(rates: Mapping[str, float]) -> str:
    """`NAME RATE` for each model that a stage ran, in tokens per second."""
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
