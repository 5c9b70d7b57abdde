"""`miniplm completion bash|zsh|fish`: prints a script that completes commands and options in a shell.

The script is made by shtab from the parsers of all commands, so it knows every option; make it again after an update.

    bash: miniplm completion bash > ~/.local/share/bash-completion/completions/miniplm
    zsh:  miniplm completion zsh > ~/.zfunc/_miniplm     (with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)
    fish: miniplm completion fish > ~/.config/fish/completions/miniplm.fish
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import shtab

from jobs.cli import COMMANDS, module_name
from jobs.command import Command, guarded, make_parser
from jobs.stage_runner import stage_parser
from jobs.stages import SERVICES, STAGES
from jobs.text import as_json
from miniplm_udf.errors import EXIT_DONE

LOGGER = logging.getLogger("miniplm.jobs")

SHELLS = ("bash", "zsh", "fish")
_STAGES = {stage.name for stage in (*STAGES, *SERVICES)}


def full_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm` with all commands; it only describes them, each command parses its own options."""
    parser = argparse.ArgumentParser(prog="miniplm", description="MiniPLM on Spark")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, line in COMMANDS.items():
        try:
            parents = [_parser_of(name)]
        except ImportError as error:  # a command of an extra that is not installed
            LOGGER.warning("%s: its options are not completed: %s", name, error)
            parents = []
        commands.add_parser(name, parents=parents, add_help=False, help=line)
    return parser


def _parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    if name in _STAGES:
        return stage_parser(name)
    module = importlib.import_module(module_name(name))
    command = getattr(module, "COMMAND", None)
    if isinstance(command, Command):
        return command.parser()
    parser: argparse.ArgumentParser = module.command_parser()
    return parser


def script(shell: str) -> str:
    """Returns the completion script of a shell.

    Args:
        shell: bash, zsh or fish.
    """
    return shtab.complete(full_parser(), shell=shell)


def command_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm completion`."""
    parser = make_parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm completion` and returns its exit code; `argv` defaults to the arguments of the process."""
    arguments = command_parser().parse_args(argv)

    def body() -> int:
        text = script(arguments.shell)
        print(as_json({"shell": arguments.shell, "script": text}) if arguments.json else text)
        return EXIT_DONE

    return guarded(body, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
