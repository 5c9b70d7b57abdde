"""The argparse parsers of all commands, taken from the commands themselves.

A command's parser is made inside its `main`. `parser_of` calls `main` and takes the parser at the moment at which it
would parse the command line, so nothing of the command runs. Imports the command's module, and starts nothing.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from jobs import cli, corpus


class _Reached(BaseException):  # no command handles it
    """The parser of a command, at the moment at which it would parse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def _stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
    raise _Reached(parser)


@contextlib.contextmanager
def _stops_at_parsing() -> Iterator[None]:
    # Every other method that parses calls one of these.
    names = ("parse_known_args", "parse_known_intermixed_args")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, name, _stop))
        yield


def reached_parser(main: Callable[[Sequence[str]], Any], words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser that `main` would parse with.

    Args:
        main: the entry point of a command.
        words: its arguments; a command with actions takes the action from them.

    Raises:
        LookupError: `main` parses nothing.
    """
    with _stops_at_parsing():
        try:
            main(list(words))
        except _Reached as reached:
            return reached.parser
    raise LookupError(f"{main.__module__}.main: expected a parser of the command line, found none")


def parser_of(command: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser of `miniplm COMMAND`.

    Args:
        command: the word after `miniplm`.
        words: the words after it; only `corpus` needs them, for its action.
    """
    return reached_parser(cli.main, [command, *words])


def trainer_parsers() -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of `python -m trainer ACTION` by action."""
    from trainer import __main__ as trainer

    parser = reached_parser(trainer.main, ["train"])
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def corpus_actions() -> list[str]:
    """Returns the actions of `miniplm corpus`."""
    return list(corpus.ACTIONS)
