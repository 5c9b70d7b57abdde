"""A process that runs commands one after the other in one JVM (commands.py), and stops those that serve."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.user_corpus import REPOSITORY

_PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        code: its exit code.
        stdout: what it printed.
        stderr: its log and its errors.
        seconds: how long it took.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float


class CommandProcess:
    """The process; its commands run in a folder.

    Args:
        folder: where the commands run.
        environment: the variables of the process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._printed = tempfile.NamedTemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/support/commands.py")],
            cwd=folder, env=dict(environment), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed,
        )  # fmt: skip

    def __enter__(self) -> "CommandProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._printed.close()

    def run(self, words: Sequence[str], is_up: Callable[[str], bool] | None = None) -> Result:
        """Runs a command to its end.

        Args:
            words: the words after `miniplm`, or `python -m trainer ...`.
            is_up: for a service: whether it is up, by what it has printed; it then gets SIGTERM.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        start, begun = self._printed.seek(0, os.SEEK_END), time.monotonic()
        print(json.dumps(list(words)), file=self._process.stdin, flush=True)
        while not select.select([self._process.stdout], [], [], 0.3)[0]:
            assert time.monotonic() - begun < _PATIENCE_SECONDS, f"{words} runs for {_PATIENCE_SECONDS} s"
            if is_up is not None and is_up(self._printed_since(start)):
                os.kill(self._process.pid, signal.SIGTERM)
                is_up = None
        line = self._process.stdout.readline()
        assert line, f"{words} ended the process: {self._printed_since(start)[-3000:]}"
        result = json.loads(line)
        return Result(result["code"], self._printed_since(start), result["stderr"], time.monotonic() - begun)

    def _printed_since(self, start: int) -> str:
        self._printed.seek(start)
        return self._printed.read()
