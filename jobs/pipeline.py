"""`miniplm run`: all stages in order, skipping those whose inputs and config have not changed.

    ingest -> annotate -> reference -> score -> proxy -> refine -> pack -> train -> evaluate -> report

Reads and writes every table of DESIGN's drawing, through the stages. Spark stages share one session; the trainer's
stages are processes of their own. A kill loses at most what the running stage was doing: each stage can be rerun.
Submit: `miniplm run -c conf/demo.yaml [--dry-run] [--retrain-reference] [key=value ...]`.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs import records
from jobs.session import add_config_arguments, exit_code, guarded, make_session
from jobs.summary import build_summary, summary_text, write_summary
from jobs.trainer_process import run_trainer
from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, ConfigError, CorpusError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")

Run = Callable[["SparkSession", ExperimentConfig], dict[str, Any]]


def reference_exists(config: ExperimentConfig) -> bool:
    assert config.reference is not None
    return storage.exists(storage.join(config.model_uri(config.reference.alias), "config.json"))


def stage_runs(config_path: str, overrides: Sequence[str], retrain_reference: bool = False) -> dict[str, Run]:
    """The function of each stage; the trainer's take the config file and overrides along to their process."""

    def reference(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
        from jobs.pack import run_reference

        assert config.reference is not None
        summary = run_reference(spark, config)
        options = ["--reference", *(["--retrain"] if retrain_reference else [])]
        run_trainer("train", config_path, overrides, *options)
        return {**summary, "model": config.model_uri(config.reference.alias)}

    def train(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
        run_trainer("train", config_path, overrides)
        return {"students": {name: config.model_uri(name) for name in config.students}}

    def evaluate(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
        run_trainer("evaluate", config_path, overrides)
        return {"students": list(config.students)}

    def spark_stage(stage: str) -> Run:
        def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
            import importlib

            found: dict[str, Any] = importlib.import_module(f"jobs.{stage}").run(spark, config)
            return found

        return run

    return {
        **{stage: spark_stage(stage) for stage in ("ingest", "annotate", "score", "proxy", "refine", "pack", "report")},
        "reference": reference,
        "train": train,
        "evaluate": evaluate,
    }


def applies(config: ExperimentConfig, stage: str) -> bool:
    """Whether the experiment has this stage at all."""
    if stage == "annotate":
        return config.annotate is not None
    if stage == "reference":
        return config.reference is not None
    if stage == "proxy":
        return config.proxy is not None
    if stage == "refine":
        return bool(config.refine.corpora)
    if stage == "evaluate":
        return bool(config.students) and config.ingest.split.heldout > 0
    return bool(config.students) if stage in ("pack", "train") else True


def must_run(spark: "SparkSession", config: ExperimentConfig, stage: str, retrain_reference: bool) -> bool:
    if stage != "reference":
        return not records.is_unchanged(spark, config, stage)
    if retrain_reference or not reference_exists(config):
        return True
    if records.read_record(config, stage) and not records.is_unchanged(spark, config, stage):
        LOGGER.warning(
            "reference: its config has changed since it was trained; it stays as it is, so that scores made with it "
            "stay comparable; --retrain-reference trains it anew, and the corpus is then scored anew"
        )
    return False


def _check_heldout(config: ExperimentConfig, ingested: dict[str, Any]) -> None:
    """Refuses, before hours of training, a corpus that leaves nothing to evaluate on."""
    if not ingested["by_split"].get("heldout"):
        raise CorpusError(
            f"ingest: expected held-out documents to evaluate the students on, found none: {ingested['instances']} "
            f"instances, ingest.split.heldout {config.ingest.split.heldout}; ingest more text, or set a larger share "
            "and a new root (a share of 0 leaves out the evaluation)"
        )


def run_stages(
    config: ExperimentConfig, runs: dict[str, Run], stages: Sequence[str], retrain_reference: bool, force: bool
) -> int:
    """Runs the stages that apply and are not up to date; returns the highest exit code of them."""
    session = make_session(config, "miniplm")
    worst = EXIT_DONE
    try:
        for stage in stages:
            if not applies(config, stage):
                if force:
                    raise ConfigError(f"{stage}: the config has nothing for this stage")
                continue
            # A stage that was asked for by name runs, but for a frozen reference.
            if not (force and stage != "reference") and not must_run(session, config, stage, retrain_reference):
                LOGGER.info("%s: unchanged, skipped", stage)
                worst = max(worst, exit_code((records.read_record(config, stage) or {}).get("summary", {})))
                continue
            LOGGER.info("%s: starting", stage)
            summary = records.execute(stage, runs[stage], session, config)
            worst = max(worst, exit_code(summary))
            if stage == "ingest" and "evaluate" in stages and applies(config, "evaluate"):
                _check_heldout(config, summary)
    finally:
        session.stop()
    return worst


def dry_run(config: ExperimentConfig, stages: Sequence[str]) -> None:
    """Prints the resolved config and what each stage has done so far. Starts nothing."""
    print(json.dumps(printable(to_dict(config)), indent=2))
    print("\nplan:")
    for stage in stages:
        if not applies(config, stage):
            print(f"  {stage:<10} not part of this experiment")
            continue
        record = records.read_record(config, stage)
        done = f"ran before ({record['seconds']:.0f} s); again only if its inputs changed" if record else "would run"
        print(f"  {stage:<10} {done}")


def main(argv: Sequence[str] | None = None, stage: str | None = None) -> int:
    """`miniplm run`, or, with `stage`, that one stage, whether or not it is up to date."""
    parser = argparse.ArgumentParser(
        prog=f"miniplm {stage or 'run'}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    if stage in (None, "reference"):
        parser.add_argument(
            "--retrain-reference", action="store_true", help="train the reference anew (its scores are then made anew)"
        )

    def body() -> int:
        arguments = parser.parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        stages = records.STAGES if stage is None else (stage,)
        retrain = bool(getattr(arguments, "retrain_reference", False))
        if arguments.dry_run:
            dry_run(config, stages)
            return EXIT_DONE
        if stage is None and config.stream.trigger != "available_now":
            raise ConfigError(
                "stream.trigger: `miniplm run` goes through all stages once, so it expects available_now, found "
                f"{config.stream.trigger}; `miniplm stream` keeps ingesting and scoring"
            )
        config.report_folder()
        runs = stage_runs(arguments.config, arguments.overrides, retrain)
        code = run_stages(config, runs, stages, retrain, force=stage is not None)
        if stage is None:
            summary = build_summary(config)
            write_summary(config, summary)
            print(summary_text(config, summary))
        else:
            print(json.dumps((records.read_record(config, stage) or {}).get("summary"), indent=2))
        return code

    return guarded(body)
