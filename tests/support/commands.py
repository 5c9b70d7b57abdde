"""Runs commands in this process, so that they share a JVM: `python tests/support/commands.py [LINES]`.

Input: a JSON list of command lines as the argument; without it, one command line a line on stdin, as JSON lists. A
command line is the words after `miniplm`, or `python -m trainer ...`. Output: one JSON line a command on stdout, with
its exit code and everything that it and the JVM wrote to stderr. A command of `miniplm` goes through `jobs.cli.main`,
and has its own Spark session.
"""

import json
import os
import sys
import tempfile

from jobs import cli

TRAINER = ["python", "-m", "trainer"]


def run(arguments: list[str]) -> dict[str, object]:
    """Exit code and stderr of one command line."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
        kept = os.dup(2)
        os.dup2(stderr.fileno(), 2)
        try:
            code = _main(arguments)
        except SystemExit as end:  # of a parser
            code = end.code
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        stderr.seek(0)
        return {"code": code, "stderr": stderr.read()}


def _main(arguments: list[str]) -> object:
    if arguments[:3] != TRAINER:
        return cli.main(arguments)
    from trainer.__main__ import main

    return main(arguments[3:])


if __name__ == "__main__":
    # The commands print their summaries to stdout; the results come to the stdout that this process was given.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        lines = json.loads(sys.argv[1]) if sys.argv[1:] else map(json.loads, sys.stdin)
        for command_line in lines:
            print(json.dumps(run(command_line)), file=results, flush=True)
