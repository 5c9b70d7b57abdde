"""The `miniplm` command. The first word names the command; `run` runs all stages.

Owns only the choice of the command; every command is a module of `jobs` with a `main` and parses its own options. No
command's module is imported before it is chosen. A signal that comes before the command handles signals, and a reader
of stdout that has gone, end the process without a trace too.
"""

import importlib
import signal
import sys
from collections.abc import Sequence

from jobs.command import quiet_pipe
from jobs.stages import SERVICES, STAGES
from jobs.text import table
from miniplm_udf import __version__, failures, progress
from miniplm_udf.stopping import Stopped

_STAGES = {stage.name: stage.help for stage in (*STAGES, *SERVICES)}
COMMANDS = {
    "init": "looks at your texts and your teacher, and writes a commented experiment file that runs as it is",
    "run": "all stages in order, skipping those whose inputs and config have not changed",
    "estimate": "what it will cost, from a sample: tokens, FLOPs, seconds, bytes, rejects; writes nothing",
    **_STAGES,
    "corpus": "versions of corpora: list, show, diff, pin, unpin, restore, rebuild; take-down of documents",
    "inspect": "texts that a corpus kept, or dropped, with their scores",
    "explore": "a local page over a corpus: texts kept and dropped, side by side, by source, score and words",
    "export": "a corpus as JSON lines or Parquet, with texts, spans and scores, for other trainers",
    "compare": "students × metrics, with the spread over seeds, and the page of MLflow that compares their runs",
    "status": "the progress of a root's queries; also as Prometheus text",
    "verify": "checks that no row is lost or duplicated and that all sums agree",
    "maintain": "merges small files and removes old ones; pinned versions and running queries keep theirs",
    "doctor": "versions, Java, GPUs, jars, storage, MLflow: what is there, and what is missing",
    "completion": "prints the completion script of bash, zsh or fish",
    "demo-text": "write the demo's corpus from documentation found on this machine",
}
# Modules with another name than their command: a file inspect.py would hide Python's own from the files next to it.
_MODULES = {"run": "pipeline", "inspect": "inspect_corpus", "demo-text": "demo_text"}


def module_name(command: str) -> str:
    """Returns the name of a command's module.

    Args:
        command: one of `COMMANDS`.
    """
    return f"jobs.{_MODULES.get(command, command)}"


def usage() -> str:
    """The help of `miniplm` itself: every command with one line."""
    return "\n".join(
        [
            "usage: miniplm COMMAND -c CONFIG [options] [key=value ...]",
            "",
            "MiniPLM (arXiv 2410.17215) as a streaming engine on Spark. Commands:",
            "",
            table(None, list(COMMANDS.items()), "  "),
            "",
            "`miniplm COMMAND --help` lists the options. Example: miniplm run -c conf/demo.yaml root=/data/demo",
            "Every command has --json (the result as JSON) and --debug (debug messages, and the trace of an error).",
            "exit codes: 0 done; 1 failed; 2 bad config or usage; 3 done, with rejects over the configured share; "
            "128 + signal: stopped by a signal",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command and its options; None takes the arguments of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return quiet_pipe(lambda: _run(arguments))
    except KeyboardInterrupt:
        stopped = Stopped(signal.SIGINT)
        print(f"miniplm: {stopped.message}", file=sys.stderr)
        return stopped.exit_code
    except Exception as error:  # of an import, or of the parser of a command
        with progress.debugging("--debug" in arguments):
            return failures.report(error)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(f"miniplm {__version__}")
        return 0
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"miniplm: unknown command {command!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(module_name(command)).main(rest))


if __name__ == "__main__":
    sys.exit(main())
