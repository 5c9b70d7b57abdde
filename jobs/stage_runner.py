"""Runs stages: decides whether one must run, runs it, writes its record, and is the `main` of every stage's command.

Input: a `Stage`, the config and the options; output: the stage's tables and its record. The inputs' fingerprint is
taken before the stage runs, so a file that arrives meanwhile makes the next run work again. A stage that was killed has
no record for its work; the same command runs it again. Driver only.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import plan, records
from jobs.checking import read_checked, require_none
from jobs.command import add_config_arguments, exit_code, guarded, make_parser, print_plan
from jobs.reject_text import reject_sentence
from jobs.session import spark_session
from jobs.stage import Options, Stage
from jobs.stage_text import stage_text
from jobs.stages import stage_named
from jobs.text import as_json
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.store.catalog import register_tables
from miniplm_udf.task_progress import watched_tasks
from miniplm_udf.upkeep import preflight

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")


def must_run(
    stage: Stage, spark: "SparkSession | None", config: ExperimentConfig, options: Options, is_named: bool
) -> bool:
    """Whether a stage has to run.

    Args:
        stage: the stage; it applies to the config.
        spark: the session; None if the stage needs none.
        config: the experiment.
        options: the options of the command line.
        is_named: the user asked for this stage by its name. It runs then, unless it is frozen.

    Returns:
        False if the stage is unchanged, or if it is frozen and its output exists.

    Raises:
        CorpusError: the output of a frozen stage is missing, and other outputs depend on it.
    """
    if stage.frozen is None:
        return is_named or not stage.is_unchanged(spark, config)
    if stage.frozen.is_asked_for(options):
        return True
    stage.frozen.require(config)
    if stage.missing(config):
        return True
    if stage.record(config) and not stage.is_unchanged(spark, config):
        LOGGER.warning("%s: its config has changed since it was made. %s", stage.name, stage.frozen.consequence)
    return False


def execute(
    stage: Stage, spark: "SparkSession | None", config: ExperimentConfig, options: Options | None = None
) -> Any:
    """Runs a stage and writes its record, unless it is a service or does a part of its work.

    Args:
        stage: the stage.
        spark: the session; None if the stage needs none.
        config: the experiment.
        options: the options of the command line; None: there are none.

    Returns:
        The summary, as the stage's `run` returns it.

    Raises:
        CorpusError: a table that the stage continues from is gone; `spark.schema` has the tables of another root.
    """
    options = options or Options()
    if spark is None:
        preflight.check_files(config.root, stage.needed_tables)
    else:
        preflight.check(spark, config, stage.needed_tables, stage.queries)
    leaves_record = not (stage.is_service(options) or stage.is_partial(options))
    fingerprint = str(stage.fingerprint(spark, config)) if leaves_record else ""
    earlier = stage.record(config) if leaves_record else None
    # A schema that has another root's tables is refused before any work.
    _register(spark, config)
    start = time.monotonic()
    LOGGER.info("%s: %s", stage.name, stage.help)
    with contextlib.nullcontext() if spark is None else watched_tasks(spark, stage.name):
        summary = stage.run(spark, config, options)
    seconds = time.monotonic() - start
    _register(spark, config)
    if leaves_record:
        summary = stage.with_earlier(earlier.summary if earlier else None, summary)
        records.write_record(config, stage.name, fingerprint, stage.to_json(summary), seconds)
    LOGGER.info("%s: done in %.1f s", stage.name, seconds)
    return summary


def _register(spark: "SparkSession | None", config: ExperimentConfig) -> None:
    if spark is not None and config.spark.schema is not None:
        register_tables(spark, config.root, config.spark.schema)


def stage_parser(name: str) -> argparse.ArgumentParser:
    """Returns the parser of a stage's command line.

    Args:
        name: the stage.
    """
    stage = stage_named(name)
    parser = make_parser(name, stage.description)
    add_config_arguments(parser)
    stage.add_arguments(parser)
    return parser


def stage_main(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs the command of one stage: `miniplm NAME`, and `jobs/NAME.py` under spark-submit.

    Args:
        name: the stage.
        argv: the words after the name; None takes the arguments of the process.

    Returns:
        The exit code. The summary is printed as text, or with `--json` as `{NAME: summary}`; with `--dry-run`, the
        config and the plan.
    """
    stage = stage_named(name)
    arguments = stage_parser(name).parse_intermixed_args(argv)

    def body() -> int:
        config, problems = read_checked(name, arguments, lambda config: [name] if stage.applies(config) else [])
        options = Options.of(arguments)
        if arguments.dry_run:
            print_plan(config, plan.plan_text([stage], config, options, is_named=True), arguments.json, len(problems))
        require_none(problems)
        if arguments.dry_run:
            return EXIT_DONE
        if not stage.applies(config):
            raise ConfigError(f"{name}: the config has nothing for this stage; expected {stage.needs}, found none")
        summary = _run_or_skip(stage, config, options)
        plain = {} if summary is None else stage.to_json(summary)
        last_line = "" if summary is None else stage.last_line(summary)
        print(as_json({name: plain}) if arguments.json else stage_text(name, plain, [last_line]), flush=True)
        # After the summary, which may be long.
        if last_line:
            print(last_line, file=sys.stderr)
        if sentence := reject_sentence(name, config, summary):
            print(f"miniplm: {sentence}", file=sys.stderr)
        return exit_code(summary)

    return guarded(body, arguments.debug)


def _run_or_skip(stage: Stage, config: ExperimentConfig, options: Options) -> Any:
    """Runs a stage that the user named, unless its output is kept; returns its summary, or None if it never ran."""
    preflight.require_writable(config.root)  # before Spark starts
    session = spark_session(config, f"miniplm {stage.name}") if stage.needs_spark else contextlib.nullcontext()
    with session as spark:
        if must_run(stage, spark, config, options, is_named=True):
            return execute(stage, spark, config, options)
        LOGGER.info("%s: unchanged, skipped", stage.name)
        record = stage.record(config)
        return record.summary if record else None


def tell_rejects(stages: Sequence[Stage], config: ExperimentConfig) -> None:
    """Prints on stderr a sentence for each stage whose last run rejected more rows than the config allows.

    Args:
        stages: the stages.
        config: the experiment.
    """
    for stage in stages:
        record = stage.record(config) if stage.applies(config) else None
        if sentence := record and reject_sentence(stage.name, config, record.summary):
            print(f"miniplm: {sentence}", file=sys.stderr)
