"""The stages of an experiment: what each reads, writes, needs and does, described once.

`STAGES` are the stages of `miniplm run`, in their order; `SERVICES` run until they are stopped and leave no record.
The single commands, dry runs, skipping, records and the summary all come from here; `stage.py` declares `Stage`, and
`stage_runner.py` runs a stage. To add a stage: write `jobs/NAME.py` with `run` and `main`, and add a `Stage` here.
Driver only; nothing heavy is imported before a stage runs or its record is read, and only `listed` needs Spark.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs import stage_inputs, stage_results
from jobs.evaluation_text import evaluation_text
from jobs.stage import Frozen, Options, Outputs, Stage, StageFunction
from jobs.text import as_json
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import EVALUATION_FILE
from miniplm_udf.schemas import table_names

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def _job(name: str) -> StageFunction:
    """The function `run` of `jobs.NAME`, imported when the stage runs."""

    def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> Any:
        return importlib.import_module(f"jobs.{name}").run(spark, config)

    return run


def _job_with_options(name: str) -> StageFunction:
    """As `_job`, for a `run` that takes the options too."""

    def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> Any:
        return importlib.import_module(f"jobs.{name}").run(spark, config, options)

    return run


def _refine_or_follow(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> Any:
    """Refines the corpora; with --follow, follows them instead."""
    job = importlib.import_module("jobs.refine")
    return job.follow(spark, config, options.corpora) if options.follow else job.run(spark, config)


def _add_retrain_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retrain-reference", action="store_true",
        help="train the reference again; then all instances are scored again with it",
    )  # fmt: skip


def _add_refit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refit", action="store_true", help="fit the proxy again, to the instances scored so far")


def _require_reference(config: ExperimentConfig) -> None:
    """Refuses to train a new reference if instances were scored with the lost one.

    All instances would have to be scored again.
    """
    assert config.reference is not None
    alias, (file,) = config.reference.alias, stage_inputs.reference_files(config)
    record = config.layout.model_record(alias)
    if storage.exists(record) and not storage.exists(file):
        raise CorpusError(
            f"reference {storage.redact(config.layout.model(alias))}: expected the model that "
            f"{config.layout.relative(record)} describes, found none; put it back from a copy, or train another with "
            "--retrain-reference: the corpus is then scored again"
        )


def _report_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `report`, and when each stage before it finished."""
    records = {stage.name: stage.record(config) for stage in STAGES if stage.name != "report"}
    return [to_dict(config.report), {name: record.finished_at for name, record in records.items() if record}]


_REPORT_TABLES = ("instances", "rejects", "scores", "score_matrix", "corpora")


def _report_reads(config: ExperimentConfig) -> list[str]:
    """The tables of the page, and the outputs of the other stages of the experiment."""
    others = [stage.outputs(config) for stage in STAGES if stage.name != "report" and stage.applies(config)]
    places = [place for outputs in others for place in (*outputs.tables, *outputs.files)]
    return list(dict.fromkeys([*_REPORT_TABLES, *places]))


class _PrintRules(argparse.Action):
    """Prints the rules and ends the command, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from miniplm_udf.config.rules import describe, load_rules

        print(as_json(load_rules()) if "--json" in getattr(parser, "words", ()) else describe())
        parser.exit()


def _adds_student_argument(what: str) -> Callable[[argparse.ArgumentParser], None]:
    """The function that adds `--student`, with `what` as its help."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--student", action="append", default=[], dest="students", metavar="NAME", help=what)

    return add


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
        needed_tables=["document_keys"],
        queries=["ingest"],
        inputs=stage_inputs.ingest_inputs,
        listed=stage_inputs.ingest_files,
        reads=lambda config: config.ingest.inputs,
        outputs=lambda config: Outputs(["instances"]),
        may_write=["rejects"],
        numbers=stage_results.ingest_numbers,
        last_line=lambda summary: str(summary.said),
        check_result=stage_results.check_heldout,
    ),
    Stage(
        name="annotate",
        help="instances -> annotations: duplicates, contamination, language, quality, as columns for refine",
        run=_job("annotate"),
        needed_tables=["instances"],
        inputs=stage_inputs.annotate_inputs,
        listed=stage_inputs.evaluation_files,
        reads=lambda config: ["instances"],
        outputs=lambda config: Outputs(["annotations"]),
        applies=lambda config: config.annotate is not None,
        needs="the section `annotate`",
        to_json=lambda summary: summary.to_dict(),
    ),
    Stage(
        name="reference",
        help="train the reference LM on the reference split, once",
        run=_job_with_options("reference"),
        needed_tables=["instances"],
        inputs=stage_inputs.reference_inputs,
        reads=lambda config: ["instances"],
        outputs=lambda config: Outputs(files=stage_inputs.reference_files(config)),
        applies=lambda config: config.reference is not None,
        needs="the section `reference`",
        frozen=Frozen(
            option="--retrain-reference",
            is_asked_for=lambda options: options.retrain_reference,
            consequence="It is kept as it is, so that scores made with it stay comparable; --retrain-reference trains "
            "it again, and the corpus is then scored again",
            require=_require_reference,
        ),
        rates=stage_results.reference_rates,
        add_arguments=_add_retrain_argument,
    ),
    Stage(
        name="score",
        help="instances -> scores -> score_matrix, with every configured model",
        run=_job("score"),
        needed_tables=["instances"],
        queries=["score", "score_matrix"],
        inputs=stage_inputs.score_inputs,
        reads=lambda config: ["instances", *stage_inputs.weights(config).values()],
        outputs=lambda config: Outputs(["scores", "score_matrix"]),
        may_write=["rejects"],
        with_earlier=stage_results.with_earlier_rates,
        numbers=stage_results.score_numbers,
        rates=stage_results.score_rates,
    ),
    Stage(
        name="proxy",
        help="a small regressor learns the score from a scored sample, and predicts it for all the pool",
        run=_job_with_options("proxy"),
        needed_tables=["instances", "score_matrix"],
        queries=["proxy"],
        inputs=stage_inputs.proxy_inputs,
        reads=lambda config: ["instances", "score_matrix"],
        outputs=lambda config: Outputs(["proxy_scores"]),
        applies=lambda config: config.proxy is not None,
        needs="the section `proxy` (`proxy: {}` takes the defaults)",
        numbers=stage_results.proxy_numbers,
        add_arguments=_add_refit_argument,
    ),
    Stage(
        name="refine",
        help="score_matrix -> a new version of each refined corpus; --follow keeps them growing",
        run=_refine_or_follow,
        needed_tables=["score_matrix"],
        inputs=stage_inputs.refine_inputs,
        reads=stage_inputs.refine_reads,
        outputs=lambda config: Outputs(["corpora", *map(table_names.refined, config.refine.corpora)]),
        applies=lambda config: bool(config.refine.corpora),
        needs="at least one corpus under `refine.corpora` (conf/demo.yaml has examples)",
        is_service=lambda options: options.follow,
        numbers=stage_results.refine_numbers,
        add_arguments=_add_refine_arguments,
    ),
    Stage(
        name="generate",
        help="a model continues the beginnings of instances -> generations, the corpus of SeqKD",
        run=_job("generate"),
        needed_tables=["instances"],
        queries=["generate"],
        inputs=stage_inputs.generate_inputs,
        reads=stage_inputs.generate_reads,
        outputs=lambda config: Outputs(["generations"]),
        may_write=["rejects"],
        applies=lambda config: config.generate is not None,
        needs="the section `generate` (`generate: {}` takes the defaults)",
        numbers=stage_results.generate_numbers,
    ),
    Stage(
        name="pack",
        help="refined corpora and generations -> token sequences for the students' tokenizers",
        run=_job("pack"),
        needed_tables=["instances"],
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
        rates=stage_results.student_rates,
        is_partial=lambda options: bool(options.students),
        add_arguments=_adds_student_argument(
            "train only this student; may be repeated; default: all students"
        ),
    ),
    Stage(
        name="evaluate",
        help="losses of the students on held-out and external texts, and their scores on tasks",
        run=_job_with_options("evaluate"),
        needed_tables=["instances"],
        inputs=stage_inputs.evaluate_inputs,
        reads=stage_inputs.evaluate_reads,
        outputs=lambda config: Outputs(files=stage_inputs.model_files(config, EVALUATION_FILE)),
        applies=stage_inputs.has_evaluation,
        needs="a student under `students`, and a share `ingest.split.heldout` above 0, `evaluate.inputs` or "
        "`evaluate.tasks`",
        is_partial=lambda options: bool(options.students),
        needs_spark=False,
        last_line=lambda summary: evaluation_text(summary.students),
        add_arguments=_adds_student_argument(
            "evaluate only this student; may be repeated; default: all students, and the reference"
        ),
    ),
    Stage(
        name="report",
        help="summary.json and report.html",
        run=_job("report"),
        needed_tables=_REPORT_TABLES,
        inputs=_report_inputs,
        reads=_report_reads,
        outputs=lambda config: Outputs(files=[config.report_file("report.html")]),
    ),
)  # fmt: skip

SERVICES = (
    Stage(
        name="stream",
        help="a service: ingest, score and the matrix at once, until it is stopped",
        run=_job("stream"),
        needed_tables=["document_keys"],
        queries=["ingest", "score", "score_matrix"],
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
