"""`miniplm compare`: students × metrics, with the spread over seeds, and the page of MLflow that compares their runs.

Reads `<root>/models/*/training.json` and `evaluation.json`, or with --mlflow the runs of the MLflow experiment; writes
nothing and starts no Spark. Students that differ in nothing but `train.seed`, and one student in several roots, are
one row: mean ± standard deviation over the trainings.

    miniplm compare -c conf/demo.yaml [--also CONFIG_OR_ROOT ...] [--mlflow] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/compare.py -c conf/demo.yaml
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.summary import mlflow_arguments
from jobs.text import table
from miniplm_udf import storage
from miniplm_udf.config.evaluate import task_columns
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.errors import CorpusError
from miniplm_udf.report import comparison
from miniplm_udf.report.comparison import AVERAGE, BITS_PER_BYTE, ComparedStudent, Spread
from miniplm_udf.report.newer_versions import NewerVersion, newer_versions

_TASK = "tasks/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of the command.

    Attributes:
        students: one entry per setting, the best held-out loss first.
        newer_versions: corpora that have been refined again since students were trained on them.
        mlflow_url: MLflow's page that compares the runs; None without runs.
        mlflow_command: starts the server of that page; None if a server is configured.
    """

    students: list[ComparedStudent]
    newer_versions: list[NewerVersion]
    mlflow_url: str | None
    mlflow_command: list[str] | None


def text(result: Comparison) -> str:
    """Returns the comparison as text: tables of the students, the differences and the tasks, and MLflow's page.

    Args:
        result: the comparison.
    """
    sets = dict.fromkeys(name for student in result.students for name in student.metrics if not name.startswith(_TASK))
    names = [BITS_PER_BYTE, *(name for name in sets if name != BITS_PER_BYTE)]
    heads = ["held-out bits/byte", *(f"{name.split('/')[1]} bits/byte" for name in names[1:])]
    rows = [
        (*_facts(student), *(_shown(student.metrics.get(name), 4) for name in names)) for student in result.students
    ]
    head = ("student", "corpus", "version", "tokenizer", "trainings", "steps", "tokens", "FLOP", *heads)
    parts = [table(head, rows), *_differences(result.students), *_tasks(result.students)]
    if any(spread.n > 1 for student in result.students for spread in student.metrics.values()):
        parts.append("Mean ± standard deviation over the trainings that differ in their seeds.")
    parts += map(_newer_version, result.newer_versions)
    if result.mlflow_url:
        start = f"{shlex.join(result.mlflow_command)}\n" if result.mlflow_command else ""
        parts.append(f"These runs in MLflow:\n{start}{result.mlflow_url}")
    return "\n\n".join(parts)


def _newer_version(newer: NewerVersion) -> str:
    trained = ", ".join(f"{name} (version {version})" for name, version in newer.trained.items())
    return (
        f"The corpus {newer.corpus} has a newer version, {newer.newest}, than the students {trained} were trained on: "
        "`miniplm run` packs it and trains them again."
    )


def _facts(student: ComparedStudent) -> tuple[object, ...]:
    versions = ", ".join(map(str, student.corpus_versions))
    return (
        student.name, student.corpus, versions or None, student.tokenizer, len(student.trainings), student.steps,
        student.tokens, f"{student.flop:.2e}",
    )  # fmt: skip


def _differences(students: Sequence[ComparedStudent]) -> list[str]:
    """The table of differences to the baselines; none without a baseline."""
    rows = [
        (each.name, each.baseline, f"{each.bits_per_byte:+.4f}", f"{each.relative:+.2%}", each.reading)
        for student in students
        if (each := student.difference) is not None
    ]
    return [table(("student", "against", "bits/byte", "relative", "reading"), rows)] if rows else []


def _tasks(students: Sequence[ComparedStudent]) -> list[str]:
    """The table of accuracies in percent; none without tasks."""
    metrics = (name for student in students for name in student.metrics)
    tasks = task_columns(name.removeprefix(_TASK) for name in metrics if name.startswith(_TASK) and name != AVERAGE)
    rows = [
        (student.name, *(_percent(student.metrics.get(name)) for name in [*(_TASK + task for task in tasks), AVERAGE]))
        for student in students
        if AVERAGE in student.metrics
    ]
    return [table(("student", *tasks.values(), "Avg."), rows)] if rows else []


def _shown(spread: Spread | None, digits: int, factor: float = 1.0) -> str | None:
    if spread is None:
        return None
    mean = f"{factor * spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {factor * spread.deviation:.{digits}f}"


def _percent(spread: Spread | None) -> str | None:
    return _shown(spread, 1, 100.0)


def _other(place: str) -> ExperimentConfig:
    """The experiment of a config file or of a root."""
    if place.endswith((".yaml", ".yml")):
        return load_config(place, [])
    storage.check_location("--also", storage.to_uri(place))
    return ExperimentConfig(root=place)


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> Comparison:
    experiments = list({each.root: each for each in [config, *map(_other, arguments.also)]}.values())
    read = comparison.trainings_in_mlflow if arguments.mlflow else comparison.trainings_of_experiment
    trainings = {experiment.root: list(read(experiment)) for experiment in experiments}
    students = comparison.compare(each for of_root in trainings.values() for each in of_root)
    if not students:
        roots = ", ".join(storage.redact(experiment.root) for experiment in experiments)
        raise CorpusError(
            f"no trained student in {roots}: `miniplm train` trains them, `miniplm evaluate` evaluates them"
        )
    page = comparison.mlflow_page(config, students)
    is_server = config.mlflow_uri().startswith(("http:", "https:"))
    return Comparison(
        students=students,
        newer_versions=[each for root, of_root in trainings.items() for each in newer_versions(root, of_root)],
        mlflow_url=page,
        mlflow_command=mlflow_arguments(config) if page and not is_server else None,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--also", metavar="CONFIG_OR_ROOT", action="append", default=[],
        help="a further experiment file, or a further root; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--mlflow",
        action="store_true",
        help="compare the finished runs of the MLflow experiment, not the model folders",
    )


COMMAND = Command(
    name="compare", description=__doc__, run=_run, text=text, add_arguments=_add_arguments, takes_root=True
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm compare` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
