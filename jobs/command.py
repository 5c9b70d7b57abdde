"""The frame of every command: its options, its config, its result as text or JSON, its exit code. Driver only.

`Command` describes a command that is not a stage (stages: `stages.py`, `stage_runner.py`). `guarded` runs the body of
any command: an error becomes one line on stderr and an exit code, a signal one line and 128 + its number. Each parser
is made by `make_parser`, so that every command has `--json` and `--debug`. Starts no Spark: a command that needs Spark
opens `session.spark_session` itself.
"""

import argparse
import dataclasses
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import shtab

from jobs import java
from jobs.text import as_json
from miniplm_udf import failures, object_storage, progress, stopping, storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, EXIT_TOO_MANY_REJECTS, ConfigError

_EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def _done(result: Any) -> int:
    return EXIT_DONE


def _says_nothing(result: Any) -> str:
    return ""


class Parser(argparse.ArgumentParser):
    """A parser that keeps the words which it parses, for options that act at once.

    Attributes:
        words: the words of the command line.
    """

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the words as `argparse` does.

        Args:
            args: the words; None takes the arguments of the process.
            namespace: gets the values; None makes a new one.

        Returns:
            The namespace, and the words that no option takes.
        """
        self.words = self.words or list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)


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
        last_line: a sentence about the result for stderr, which follows the result; or "".
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
    last_line: Callable[[Any], str] = _says_nothing

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the command line."""
        parser = make_parser(self.name, self.description, self.formats)
        self.add_arguments(parser)
        add_config_arguments(parser, takes_root=self.takes_root, has_plan=self.plan is not None)
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
                print_plan(config, self.plan(config, arguments), arguments.json)
                return EXIT_DONE
            result = self.run(config, arguments)
            chosen = [as_text for name, as_text in self.formats.items() if getattr(arguments, name)]
            print((as_json if arguments.json else chosen[0] if chosen else self.text)(result), flush=True)
            if last_line := self.last_line(result):
                print(f"miniplm: {last_line}", file=sys.stderr)
            return self.exit_code(result)

        return guarded(body, arguments.debug)


def make_parser(name: str, description: str | None, formats: Iterable[str] = ()) -> Parser:
    """Returns a parser with the name and the description of a command, and the options that every command has.

    Args:
        name: the word after `miniplm`.
        description: the help text, printed as it is; usually the head of the job's file.
        formats: names of other formats of the result, in place of `--json`.
    """
    parser = Parser(
        prog=f"miniplm {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the result as JSON")
    for other in formats:
        shape.add_argument(f"--{other}", action="store_true", help=f"print {other.capitalize()} text")
    parser.add_argument("--debug", action="store_true", help="show debug messages, and the trace of an error")
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, takes_root: bool = False, has_plan: bool = True) -> None:
    """Adds the options that name the config.

    Args:
        parser: the parser of a command.
        takes_root: whether `--root` may stand in place of `-c`.
        has_plan: whether there is a `--dry-run`.
    """
    file = parser.add_argument("-c", "--config", required=not takes_root, help="experiment file, e.g. conf/demo.yaml")
    file.complete = shtab.FILE  # type: ignore[attr-defined]
    if takes_root:
        root = parser.add_argument("--root", help="the root itself, in place of -c")
        root.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    if has_plan:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan; do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. root=/data/run1")


def add_version_argument(parser: argparse.ArgumentParser, name: str = "version", metavar: str | None = None) -> None:
    """Adds a positional argument for a version of a corpus.

    Args:
        parser: the parser of a command.
        name: its name in the parsed options.
        metavar: its name in the help; None takes `name`.
    """
    parser.add_argument(
        name, metavar=metavar, type=_version, help="NAME (its newest version), NAME@NUMBER, or NAME@TAG of a pin"
    )


def _version(word: str) -> str:
    """Refuses an override in the place of a version: argparse gives the first words to the version."""
    if "=" in word:
        raise argparse.ArgumentTypeError(
            f"expected a version (NAME, NAME@NUMBER or NAME@TAG) before the overrides, found {word!r}"
        )
    return word


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


def print_plan(config: ExperimentConfig, plan: str, is_json: bool = False, n_problems: int = 0) -> None:
    """Prints the resolved config, without secrets, the plan of a dry run, and a last line that says what was found.

    Args:
        config: the experiment.
        plan: text of the plan.
        is_json: print one JSON object with `config` and the lines of `plan`.
        n_problems: number of things that are wrong; their text follows on stderr.
    """
    resolved = printable(to_dict(config))
    if is_json:
        print(as_json({"config": resolved, "plan": plan.splitlines()}))
    else:
        verdict = f"{n_problems} things are wrong" if n_problems > 1 else "one thing is wrong" * n_problems
        print(f"{json.dumps(resolved, indent=2)}\n\nplan:\n{plan}\n\n{verdict or 'checked: nothing is wrong'}")


def exit_code(summary: object) -> int:
    """Returns the exit code for a summary: 3 if it says that the rejects exceed the configured share, else 0.

    Args:
        summary: a summary of a stage; without the field `too_many_rejects`, the exit code is 0.
    """
    return EXIT_TOO_MANY_REJECTS if getattr(summary, "too_many_rejects", False) else EXIT_DONE


def guarded(body: Callable[[], int], is_debug: bool = False) -> int:
    """Runs the body of a command and turns its errors into exit codes.

    Args:
        body: the command; returns its exit code.
        is_debug: whether to show debug messages, and the trace of an error.

    Returns:
        The exit code of `body`. An error is printed as one line on stderr and gives its exit code (`failures.report`);
        a signal is printed as one line and gives 128 + its number.
    """
    with progress.debugging(is_debug), stopping.stops_on_signals(java.waits_for_java, java.end_java):
        try:
            return quiet_pipe(body)
        except stopping.Stopped as stopped:
            return _end(stopped)
        except Exception as error:
            # Calls to Java fail when a signal has ended the JVM.
            if stopped_error := stopping.received():
                return _end(stopped_error)
            return failures.report(error)


def quiet_pipe(body: Callable[[], int]) -> int:
    """Runs a function that prints; if the reader of stdout has gone (`| head -1`), the end is silent.

    Args:
        body: the function; returns an exit code.

    Returns:
        The exit code of `body`, or 141 as for a process that SIGPIPE ends.
    """
    try:
        try:
            return body()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Connections to other processes break too; these are errors.
        if not _reader_has_gone():
            raise
        # Python flushes stdout again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _end(stopped: stopping.Stopped) -> int:
    print(f"miniplm: {stopped.message}", file=sys.stderr)
    return stopped.exit_code
