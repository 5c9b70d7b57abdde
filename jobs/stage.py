"""The description of a stage of an experiment: `Stage`, and the options of its command line. Driver only, no Spark.

Input: the config, the options, the records and logs of the root. Output: whether the stage applies, whether it is
unchanged, and the summary of its last run. `stages.py` lists the stages, and `stage_runner.py` runs them. Nothing heavy
is imported before a stage runs or its record is read. Writes nothing.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.records import StageRecord, read_record
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError
from miniplm_udf.report.summary import PipelineSummary
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
        students: names of the students to train or evaluate; empty: all (and the reference, to evaluate).
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
        """Returns the options of a parsed command line; an option that the command does not have keeps its default.

        Args:
            arguments: the parsed options.
        """
        names = ("overrides", "retrain_reference", "refit", "follow", "corpora", "students")
        chosen = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
        return cls(config_path=arguments.config, **chosen)


# Returns the summary, a frozen dataclass. The session is None if the stage needs none and runs as a command of its own.
StageFunction = Callable[["SparkSession | None", ExperimentConfig, Options], Any]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Names of tables and URIs of files that a stage writes. All must exist for the stage to be skipped."""

    tables: Sequence[str] = ()
    files: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The rules of a stage whose existing output is kept, whatever has changed.

    Attributes:
        option: the option of the command line that makes the output again.
        is_asked_for: whether the command line has this option.
        consequence: the message for a kept output whose config has changed: why it is kept, and what `option` does.
        require: raises a CorpusError if the output is missing and other outputs depend on it.
    """

    option: str
    is_asked_for: Callable[[Options], bool]
    consequence: str
    require: Callable[[ExperimentConfig], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an experiment.

    Attributes:
        name: the command, the module `jobs.NAME`, and the name of its record.
        help: one line.
        run: does the work and returns the summary, a frozen dataclass; an object of `summary_class`, unless the stage
            runs as a service.
        applies: whether an experiment has this stage.
        needs: the config section that the stage requires, for messages.
        reads: names of tables, and URIs of other places, for people.
        inputs: plain data whose fingerprint decides whether the stage is unchanged: its config and the versions of its
            inputs.
        listed: files of the user that the fingerprint includes; None if they can only be listed by Spark, and the
            session is None.
        outputs: what it writes.
        may_write: further tables, which exist only if there is something to write.
        frozen: the rules for a stage whose existing output is kept (the reference); None for any other stage.
        is_service: whether it runs with these options until it is stopped, and leaves no record.
        is_partial: whether it does only a part of its work with these options, and leaves no record.
        needs_spark: whether its command starts Spark.
        needed_tables: kinds of tables without which it is refused, besides those of its queries.
        queries: stages of the streaming queries that it runs, as their checkpoints name them.
        to_json: the summary as JSON, for people and for the record.
        with_earlier: copies values that this run did not measure from the summary of the last run.
        numbers: the part of `summary.json` that comes from the summary; `rejected` is added up over all stages.
        rates: tokens per second by model, for the table that ends `miniplm run`.
        last_line: text for stderr after the summary, or "".
        check_result: raises a CorpusError for a summary that later stages of `miniplm run` cannot work with.
        add_arguments: adds options of its own.
    """

    name: str
    help: str
    run: StageFunction
    inputs: Callable[[ExperimentConfig], list[Any]] = lambda config: []
    listed: Callable[["SparkSession | None", ExperimentConfig], list[Any] | None] | None = None
    reads: Callable[[ExperimentConfig], Sequence[str]]
    outputs: Callable[[ExperimentConfig], Outputs]
    may_write: Sequence[str] = ()
    applies: Callable[[ExperimentConfig], bool] = lambda config: True
    needs: str = ""
    frozen: Frozen | None = None
    is_service: Callable[[Options], bool] = lambda options: False
    is_partial: Callable[[Options], bool] = lambda options: False
    needs_spark: bool = True
    needed_tables: Sequence[str] = ()
    queries: Sequence[str] = ()
    to_json: Callable[[Any], Json] = dataclasses.asdict
    with_earlier: Callable[[Any, Any], Any] = lambda earlier, summary: summary
    numbers: Callable[[ExperimentConfig, Any], PipelineSummary] = lambda config, summary: {}
    rates: Callable[[ExperimentConfig, PipelineSummary], Mapping[str, float]] = lambda config, summary: {}
    last_line: Callable[[Any], str] = lambda summary: ""
    check_result: Callable[[ExperimentConfig, Any], None] = lambda config, summary: None
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    @property
    def description(self) -> str | None:
        """The header of the stage's job, which `--help` shows."""
        return importlib.import_module(f"jobs.{self.name}").__doc__

    @property
    def summary_class(self) -> Any:
        """The dataclass that `run` of the stage's job returns, as the job declares it."""
        return inspect.signature(importlib.import_module(f"jobs.{self.name}").run).return_annotation

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

    def record(self, config: ExperimentConfig) -> StageRecord | None:
        """Reads the stage's record.

        Args:
            config: its root is read.

        Returns:
            The record, with the summary as a dataclass; None if the stage never finished, or if its record is of an
            earlier release and lacks a key.

        Raises:
            DamagedRecordError: the file is not a record.
        """
        return read_record(config, self.name, self.summary_class)

    def is_unchanged(self, spark: "SparkSession | None", config: ExperimentConfig) -> bool:
        """Whether the stage finished earlier with this config on these inputs, and all its outputs exist.

        Args:
            spark: the command's session; None if the stage needs none.
            config: the experiment.
        """
        record = self.record(config)
        if record is None or self.missing(config):
            return False
        return record.fingerprint == self.fingerprint(spark, config)
