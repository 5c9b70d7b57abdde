"""`miniplm run`: all stages in order; skips stages whose inputs and config have not changed.

Reads and writes every table, through the stages (`stages.py`). Spark stages share one session; the trainer's stages are
processes of their own. What can be seen to be wrong is reported at once, before anything runs (`checking.py`). A kill
loses at most the work of the running stage: each stage can be run again. A second run on the same root is refused while
the first one works; a single stage next to a run has its own lease.
Submit: `miniplm run -c conf/demo.yaml [--dry-run] [--retrain-reference] [key=value ...]`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from jobs import plan
from jobs.checking import read_checked, require_none
from jobs.command import add_config_arguments, exit_code, guarded, make_parser, print_plan
from jobs.session import spark_session
from jobs.stage import Options
from jobs.stage_runner import execute, must_run, tell_rejects
from jobs.stages import STAGES
from jobs.summary import build_summary, summary_text, write_summary
from jobs.text import as_json
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.lease import Lease
from miniplm_udf.upkeep import preflight

LOGGER = logging.getLogger("miniplm.jobs")

# A stage that is unchanged is skipped without a look at its tables, and these are lost until a user acts.
NEEDED = ("instances", "rejects", "document_keys", "scores")


def run_stages(config: ExperimentConfig, options: Options) -> int:
    """Runs the stages that apply and are not up to date.

    Args:
        config: the experiment.
        options: the options of the command line.

    Returns:
        The highest exit code of the stages; a skipped stage has the exit code of its last run.

    Raises:
        CorpusError: a table of the root is gone, or ingest has left no held-out documents to evaluate on.
    """
    highest = EXIT_DONE
    applicable = [stage for stage in STAGES if stage.applies(config)]
    with spark_session(config, "miniplm") as spark:
        preflight.check(spark, config, NEEDED)
        for stage in applicable:
            if not must_run(stage, spark, config, options, is_named=False):
                LOGGER.info("%s: unchanged, skipped", stage.name)
                record = stage.record(config)
                highest = max(highest, exit_code(record.summary if record else None))
                continue
            summary = execute(stage, spark, config, options)
            if last_line := stage.last_line(summary):
                LOGGER.info("%s", last_line)
            highest = max(highest, exit_code(summary))
            stage.check_result(config, summary)
    return highest


def _applicable(config: ExperimentConfig) -> list[str]:
    return [stage.name for stage in STAGES if stage.applies(config)]


def command_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm run`."""
    order = " -> ".join(stage.name for stage in STAGES)
    parser = make_parser("run", f"{__doc__}\nThe stages:\n\n    {order}\n")
    add_config_arguments(parser)
    for stage in STAGES:
        if stage.frozen is not None:
            stage.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm run` and returns its exit code; `argv` defaults to the arguments of the process."""
    arguments = command_parser().parse_intermixed_args(argv)

    def body() -> int:
        config, problems = read_checked("run", arguments, _applicable)
        options = Options.of(arguments)
        if config.stream.trigger != "available_now":
            raise ConfigError.of_all(
                [
                    "stream.trigger: `miniplm run` goes through all stages once, so it expects available_now, found "
                    f"{config.stream.trigger}; `miniplm stream` keeps ingesting and scoring",
                    *problems,
                ]
            )
        if arguments.dry_run:
            print_plan(config, plan.plan_text(STAGES, config, options, is_named=False), arguments.json, len(problems))
        require_none(problems)
        if arguments.dry_run:
            return EXIT_DONE
        preflight.require_writable(config.root)
        with Lease(config.layout.lease("run"), "miniplm run", what="pipeline"):
            code = run_stages(config, options)
        summary = build_summary(config)
        write_summary(config, summary)
        print(as_json(summary) if arguments.json else summary_text(config, summary, options), flush=True)
        tell_rejects(STAGES, config)
        return code

    return guarded(body, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
