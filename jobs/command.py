"""The frame of every command: its options, its config, its result as text or JSON, its exit code. Driver only.

`Command` describes a command that is not a stage (stages: `stages.py`, `stage_runner.py`). `guarded` runs the body of
any command: an error of the user becomes one line on stderr and its exit code, a signal one line and 128 + its number.
Starts no Spark: a command that needs Spark opens `session.spark_session` itself.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs import java
from jobs.text import as_json
from miniplm_udf import object_storage, progress, stopping, storage, storage_errors
from miniplm_udf.config.experiment import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, EXIT_FAILED, EXIT_TOO_MANY_REJECTS, ConfigError, MiniplmError

LOGGER = logging.getLogger("miniplm.jobs")


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def _done(result: Any) -> int:
    return EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command that is not a stage.

    Attributes:
        name: the words after `miniplm`.
        description: shown by `--help`.
        run: does the work; gets the config and the parsed options.
        text: formats the result of `run` for a terminal.
        add_arguments: adds the command's own options.
        takes_root: `--root ROOT` may stand in place of `-c CONFIG`.
        plan: returns what `--dry-run` prints after the resolved config; None: no such option. It starts no Spark.
        formats: other formats of the result, by the name of their option.
        exit_code: the exit code for a result.
    """

    name: str
    description: str | None
    run: Callable[[ExperimentConfig, argparse.Namespace], Any]
    text: Callable[[Any], str]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    takes_root: bool = False
    plan: Callable[[ExperimentConfig, argparse.Namespace], str] | None = None
    formats: Mapping[str, Callable[[Any], str]] = dataclasses.field(default_factory=dict)
    exit_code: Callable[[Any], int] = _done

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the command line."""
        parser = make_parser(self.name, self.description)
        self.add_arguments(parser)
        add_config_arguments(parser, takes_root=self.takes_root, has_plan=self.plan is not None)
        shape = parser.add_mutually_exclusive_group()
        shape.add_argument("--json", action="store_true", help="print JSON")
        for name in self.formats:
            shape.add_argument(f"--{name}", action="store_true", help=f"print {name.capitalize()} text")
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command and prints its result.

        Args:
            argv: the words after the command's name; None takes the arguments of the process.

        Returns:
            The exit code.
        """
        arguments = self.parser().parse_intermixed_args(argv)

        def body() -> int:
            config = read_config(self.name, arguments)
            if self.plan is not None and arguments.dry_run:
                print_plan(config, self.plan(config, arguments))
                return EXIT_DONE
            result = self.run(config, arguments)
            chosen = [as_text for name, as_text in self.formats.items() if getattr(arguments, name)]
            print((as_json if arguments.json else chosen[0] if chosen else self.text)(result))
            return self.exit_code(result)

        return guarded(body)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the name and the description of a command.

    Args:
        name: the word after `miniplm`.
        description: the help text, printed as it is; usually the head of the job's file.
    """
    return argparse.ArgumentParser(
        prog=f"miniplm {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_arguments(parser: argparse.ArgumentParser, takes_root: bool = False, has_plan: bool = True) -> None:
    """Adds the options that name the config.

    Args:
        parser: the parser of a command.
        takes_root: whether `--root` may stand in place of `-c`.
        has_plan: whether there is a `--dry-run`.
    """
    parser.add_argument("-c", "--config", required=not takes_root, help="experiment file, e.g. conf/demo.yaml")
    if takes_root:
        parser.add_argument("--root", help="the root itself, in place of -c")
    if has_plan:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan; do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. root=/data/run1")


def read_config(name: str, arguments: argparse.Namespace) -> ExperimentConfig:
    """Returns the config that the options name; with `--root`, the defaults on that root. From here on, this process
    reaches the storage that the config describes.

    Args:
        name: name of the command, for messages.
        arguments: the parsed options of `add_config_arguments`.

    Raises:
        ConfigError: the config is wrong, or the options name both a config and a root, or neither.
    """
    root: str | None = getattr(arguments, "root", None)
    if (arguments.config is None) == (root is None):
        raise ConfigError(f"{name}: expected either -c CONFIG or --root ROOT")
    if root is not None:
        storage.check_location("--root", storage.to_uri(root))
    config = load_config(arguments.config, arguments.overrides) if root is None else ExperimentConfig(root=root)
    object_storage.use(config.storage)
    return config


def print_plan(config: ExperimentConfig, plan: str) -> None:
    """Prints the resolved config, without secrets, and the plan of a dry run.

    Args:
        config: the experiment.
        plan: text of the plan.
    """
    print(json.dumps(printable(to_dict(config)), indent=2))
    print(f"\nplan:\n{plan}")


def exit_code(summary: object) -> int:
    """Returns the exit code for a summary: 3 if it says that the rejects exceed the configured share, else 0.

    Args:
        summary: a summary of a stage; without the field `too_many_rejects`, the exit code is 0.
    """
    return EXIT_TOO_MANY_REJECTS if getattr(summary, "too_many_rejects", False) else EXIT_DONE


def guarded(body: Callable[[], int]) -> int:
    """Runs the body of a command and turns its errors into exit codes.

    Args:
        body: the command; returns its exit code.

    Returns:
        The exit code of `body`. A MiniplmError is printed as one line on stderr and gives its own exit code; an error
        of an object storage is printed as one line and gives 1; a signal is printed as one line and gives 128 + its
        number. Any other error keeps its traceback.
    """
    progress.configure_logging()
    with stopping.stops_on_signals(java.waits_for_java, java.end_java):
        try:
            return body()
        except stopping.Stopped as stopped:
            return _end(stopped)
        except MiniplmError as error:
            if stopped_error := stopping.received():
                return _end(stopped_error)
            if os.environ.get("MINIPLM_LOG_LEVEL") == "DEBUG":
                LOGGER.exception("failed")
            print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            # Calls to Java fail when a signal has ended the JVM.
            if stopped_error := stopping.received():
                return _end(stopped_error)
            if (sentence := storage_errors.explain(error)) is None:
                raise
            if os.environ.get("MINIPLM_LOG_LEVEL") == "DEBUG":
                LOGGER.exception("failed")
            print(f"miniplm: {sentence}", file=sys.stderr)
            return EXIT_FAILED


def _end(stopped: stopping.Stopped) -> int:
    print(f"miniplm: {stopped.message}", file=sys.stderr)
    return stopped.exit_code
