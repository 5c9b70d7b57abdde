"""The stages of an experiment: what each reads, writes, needs and does, described once.

`STAGES` are the stages of `miniplm run`, in their order; `SERVICES` run until they are stopped and leave no record.
The single commands, dry runs, skipping, records and the summary all come from here; `stage_runner.py` runs a stage.
To add a stage: write `jobs/NAME.py` with `run` and `main`, and add a `Stage` here. Driver only; nothing heavy is
imported before a stage runs, and only `listed` needs Spark.
"""

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs import stage_inputs
from jobs.evaluation_text import evaluation_text
from jobs.records import read_record
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a stage's command line.

    Attributes:
        config_path: the experiment file, for the trainer's process.
        overrides: dotted overrides of the config, for the trainer's process.
        retrain_reference: train the reference again, although it exists.
        refit: fit the proxy again, although it exists.
        follow: keep refined corpora growing with the matrix.
        corpora: names of the corpora to follow; empty: all.
        students: names of the students to evaluate; empty: all, and the reference.
    """

    config_path: str = ""
    overrides: Sequence[str] = ()
    retrain_reference: bool = False
    refit: bool = False
    follow: bool = False
    corpora: Sequence[str] = ()
    students: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.corpora and not self.follow:
            raise ConfigError("--corpus: expected together with --follow; without it, all corpora are refined")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Options":
        """Returns the options in a parsed command line; an option that the command does not have keeps its default.

        Args:
            arguments: the parsed options.
        """
        names = ("overrides", "retrain_reference", "refit", "follow", "corpora", "students")
        chosen = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
        return cls(config_path=arguments.config, **chosen)


# A summary: a dataclass, or plain data. The session is None if the stage needs none and runs as a command of its own.
Run = Callable[["SparkSession | None", ExperimentConfig, Options], Any]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Names of tables and URIs of files that a stage writes. All must exist for the stage to be skipped."""

    tables: Sequence[str] = ()
    files: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an experiment.

    Attributes:
        name: the command, the module `jobs.NAME`, and the name of its record.
        help: one line.
        run: does the work and returns the summary.
        applies: whether an experiment has this stage.
        needs: the part of the config without which it does not apply.
        reads: names of tables, and URIs of other places, for people.
        inputs: plain data whose fingerprint decides whether the stage is unchanged: its config and the versions of its
            inputs.
        listed: files of the user that the fingerprint includes; None if they can only be listed by Spark, and the
            session is None.
        outputs: what it writes.
        may_write: further tables, which exist only if there is something to write.
        is_frozen: an output that exists is kept, whatever has changed (the reference).
        require: refuses, with a CorpusError, to make an output of a frozen stage again that has been used.
        is_service: whether it runs with these options until it is stopped, and leaves no record.
        is_partial: whether it does only a part of its work with these options, and leaves no record.
        needs_spark: whether its command starts Spark.
        with_earlier: completes the summary with the one of the last run.
        last_line: text for stderr after the summary, or "".
        check: refuses a config that the stage cannot finish with, before any work.
        add_arguments: adds options of its own.
    """

    name: str
    help: str
    run: Run
    inputs: Callable[[ExperimentConfig], list[Any]] = lambda config: []
    listed: Callable[["SparkSession | None", ExperimentConfig], list[Any] | None] | None = None
    reads: Callable[[ExperimentConfig], Sequence[str]]
    outputs: Callable[[ExperimentConfig], Outputs]
    may_write: Sequence[str] = ()
    applies: Callable[[ExperimentConfig], bool] = lambda config: True
    needs: str = ""
    is_frozen: bool = False
    require: Callable[[ExperimentConfig], None] = lambda config: None
    is_service: Callable[[Options], bool] = lambda options: False
    is_partial: Callable[[Options], bool] = lambda options: False
    needs_spark: bool = True
    with_earlier: Callable[[Json, Json], Json] = lambda earlier, summary: summary
    last_line: Callable[[Json], str] = lambda summary: ""
    check: Callable[[ExperimentConfig], object] = lambda config: None
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    @property
    def description(self) -> str | None:
        """The header of the stage's job, which `--help` shows."""
        return importlib.import_module(f"jobs.{self.name}").__doc__

    def missing(self, config: ExperimentConfig) -> list[str]:
        """Lists the outputs that do not exist.

        Args:
            config: the experiment.

        Returns:
            Names of tables, and URIs of files without secrets.
        """
        outputs = self.outputs(config)
        tables = [name for name in outputs.tables if not has_commits(config.layout.table(name))]
        return [*tables, *(storage.redact(uri) for uri in outputs.files if not storage.exists(uri))]

    def fingerprint(self, spark: "SparkSession | None", config: ExperimentConfig) -> str | None:
        """Hashes the config and the present inputs of the stage.

        Args:
            spark: the command's session; None if there is none yet.
            config: the experiment.

        Returns:
            The fingerprint; None if it needs Spark and there is no session.
        """
        listed = [self.listed(spark, config)] if self.listed is not None else []
        if None in listed:
            return None
        return fingerprint(json.loads(json.dumps([*self.inputs(config), *listed], default=str)))

    def is_unchanged(self, spark: "SparkSession | None", config: ExperimentConfig) -> bool:
        """Whether the stage finished earlier with this config on these inputs, and all its outputs exist.

        Args:
            spark: the command's session; None if the stage needs none.
            config: the experiment.
        """
        record = read_record(config, self.name)
        if record is None or self.missing(config):
            return False
        return bool(record["fingerprint"] == self.fingerprint(spark, config))


def _job(name: str) -> Run:
    """The function `run` of `jobs.NAME`, imported when the stage runs."""

    def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> Any:
        return importlib.import_module(f"jobs.{name}").run(spark, config)

    return run


def _job_with_options(name: str) -> Run:
    """As `_job`, for a `run` that takes the options too."""

    def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> Any:
        return importlib.import_module(f"jobs.{name}").run(spark, config, options)

    return run


def add_retrain_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--retrain-reference`.

    Args:
        parser: the parser of `miniplm run` or of the stage `reference`.
    """
    parser.add_argument(
        "--retrain-reference", action="store_true", help="train the reference again; its scores are then made again"
    )


def _add_refit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refit", action="store_true", help="fit the proxy again, to the instances scored so far")


def _require_reference(config: ExperimentConfig) -> None:
    """Refuses to train a reference in place of one that instances were scored with: they would be scored again."""
    assert config.reference is not None
    alias, (file,) = config.reference.alias, stage_inputs.reference_files(config)
    if storage.exists(config.layout.model_record(alias)) and not storage.exists(file):
        raise CorpusError(
            f"reference {storage.redact(config.layout.model(alias))}: expected the model that models/{alias}.json "
            "describes, found none; put it back from a copy, or train another with --retrain-reference: the corpus is "
            "then scored again"
        )


class _PrintRules(argparse.Action):
    """Prints the rules and ends the command, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from miniplm_udf.config.rules import describe

        print(describe())
        parser.exit()


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student", action="append", default=[], dest="students", metavar="NAME",
        help="evaluate only this student; may be repeated; default: all students, and the reference",
    )  # fmt: skip


def _add_refine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow", action="store_true", help="append newly scored rows above the cut, without refining again"
    )
    parser.add_argument(
        "--rules", action=_PrintRules, nargs=0, help="print the rules for refine.corpora.NAME.rule; no -c needed"
    )
    parser.add_argument(
        "--corpus", action="append", default=[], dest="corpora", metavar="NAME",
        help="with --follow: follow only this corpus; may be repeated",
    )  # fmt: skip


STAGES = (
    Stage(
        name="ingest",
        help="files or a table -> instances and rejects",
        run=_job("ingest"),
        inputs=stage_inputs.ingest_inputs,
        listed=stage_inputs.ingest_files,
        reads=lambda config: config.ingest.inputs,
        outputs=lambda config: Outputs(["instances"]),
        may_write=["rejects"],
        last_line=lambda summary: str(summary.get("said", "")),
    ),
    Stage(
        name="annotate",
        help="instances -> annotations: duplicates, contamination, language, quality, as columns for refine",
        run=_job("annotate"),
        inputs=stage_inputs.annotate_inputs,
        listed=stage_inputs.evaluation_files,
        reads=lambda config: ["instances"],
        outputs=lambda config: Outputs(["annotations"]),
        applies=lambda config: config.annotate is not None,
        needs="the section `annotate`",
    ),
    Stage(
        name="reference",
        help="train the reference LM on the reference split, once",
        run=_job_with_options("reference"),
        inputs=stage_inputs.reference_inputs,
        reads=lambda config: ["instances"],
        outputs=lambda config: Outputs(files=stage_inputs.reference_files(config)),
        applies=lambda config: config.reference is not None,
        needs="the section `reference`",
        is_frozen=True,
        require=_require_reference,
        add_arguments=add_retrain_argument,
        check=lambda config: config.mlflow_uri(),
    ),
    Stage(
        name="score",
        help="instances -> scores -> score_matrix, with every configured model",
        run=_job("score"),
        inputs=stage_inputs.score_inputs,
        reads=lambda config: ["instances", *stage_inputs.weights(config).values()],
        outputs=lambda config: Outputs(["scores", "score_matrix"]),
        may_write=["rejects"],
        with_earlier=stage_inputs.with_earlier_rates,
    ),
    Stage(
        name="proxy",
        help="a small regressor learns the score from a scored sample, and predicts it for all the pool",
        run=_job_with_options("proxy"),
        inputs=stage_inputs.proxy_inputs,
        reads=lambda config: ["instances", "score_matrix"],
        outputs=lambda config: Outputs(["proxy_scores"]),
        applies=lambda config: config.proxy is not None,
        needs="the section `proxy` (`proxy: {}` takes the defaults)",
        add_arguments=_add_refit_argument,
    ),
    Stage(
        name="refine",
        help="score_matrix -> a new version of each refined corpus; --follow keeps them growing",
        run=_job_with_options("refine"),
        inputs=stage_inputs.refine_inputs,
        reads=stage_inputs.refine_reads,
        outputs=lambda config: Outputs(["corpora", *(f"refined/{name}" for name in config.refine.corpora)]),
        applies=lambda config: bool(config.refine.corpora),
        needs="at least one corpus under `refine.corpora` (conf/demo.yaml has examples)",
        is_service=lambda options: options.follow,
        add_arguments=_add_refine_arguments,
    ),
    Stage(
        name="generate",
        help="a model continues the beginnings of instances -> generations, the corpus of SeqKD",
        run=_job("generate"),
        inputs=stage_inputs.generate_inputs,
        reads=stage_inputs.generate_reads,
        outputs=lambda config: Outputs(["generations"]),
        may_write=["rejects"],
        applies=lambda config: config.generate is not None,
        needs="the section `generate` (`generate: {}` takes the defaults)",
    ),
    Stage(
        name="pack",
        help="refined corpora and generations -> token sequences for the students' tokenizers",
        run=_job("pack"),
        inputs=stage_inputs.pack_inputs,
        reads=lambda config: [*stage_inputs.student_corpora(config), "instances"],
        outputs=lambda config: Outputs(stage_inputs.packed(config)),
        applies=lambda config: bool(config.students),
        needs="at least one student under `students`",
    ),
    Stage(
        name="train",
        help="train the students",
        run=_job_with_options("train"),
        needs_spark=False,
        inputs=stage_inputs.train_inputs,
        reads=stage_inputs.packed,
        outputs=lambda config: Outputs(files=stage_inputs.trained_files(config)),
        applies=lambda config: bool(config.students),
        needs="at least one student under `students`",
        check=lambda config: config.mlflow_uri(),
    ),
    Stage(
        name="evaluate",
        help="losses of the students on held-out and external texts, and their scores on tasks",
        run=_job_with_options("evaluate"),
        inputs=stage_inputs.evaluate_inputs,
        reads=stage_inputs.evaluate_reads,
        outputs=lambda config: Outputs(files=stage_inputs.model_files(config, "evaluation.json")),
        applies=stage_inputs.has_evaluation,
        needs="a student under `students`, and a share `ingest.split.heldout` above 0, `evaluate.inputs` or "
        "`evaluate.tasks`",
        is_partial=lambda options: bool(options.students),
        needs_spark=False,
        last_line=evaluation_text,
        check=lambda config: config.mlflow_uri(),
        add_arguments=_add_evaluate_arguments,
    ),
    Stage(
        name="report",
        help="summary.json and report.html",
        run=_job("report"),
        inputs=stage_inputs.report_inputs,
        reads=lambda config: ["instances", "rejects", "scores", "score_matrix", "corpora"],
        outputs=lambda config: Outputs(files=[str(config.report_folder() / "report.html")]),
        check=lambda config: config.report_folder(),
    ),
)  # fmt: skip

SERVICES = (
    Stage(
        name="stream",
        help="a service: ingest, score and the matrix at once, until it is stopped",
        run=_job("stream"),
        reads=lambda config: [*config.ingest.inputs, *stage_inputs.weights(config).values()],
        outputs=lambda config: Outputs(["instances", "scores", "score_matrix"]),
        may_write=["rejects"],
        is_service=lambda options: True,
    ),
)


def stage_named(name: str) -> Stage:
    """The stage or service with a name.

    Args:
        name: the name of an existing stage or service.
    """
    return next(stage for stage in (*STAGES, *SERVICES) if stage.name == name)
