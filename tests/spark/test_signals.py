"""Signals to the process group of a command, as `timeout`, a terminal or a scheduler sends them: one line, no trace."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("work", "number", "at", "ends_with"),
    [
        pytest.param(
            "ingest", signal.SIGTERM, "ingest: micro-batch 0", "stopped by SIGTERM before all input was read",
            marks=pytest.mark.long,
        ),
        ("batch", signal.SIGINT, "at work", "stopped by SIGINT"),
    ],
)  # fmt: skip
def test_a_signal_to_the_group_is_one_line_and_leaves_no_process(
    tmp_path: Path, work: str, number: signal.Signals, at: str, ends_with: str
) -> None:
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        command = subprocess.Popen(
            [sys.executable, "-m", "tests.support.stopped_command", work, str(tmp_path)],
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while at not in said.read_text() and command.poll() is None:
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        before = len(said.read_text().splitlines())
        os.killpg(command.pid, number)
        assert command.wait(120) == 128 + number
    finally:
        command.kill()
        command.wait()
    lines = said.read_text().splitlines()
    assert lines[-1] == f"miniplm: {ends_with}; run the same command again to continue", "\n".join(lines)
    # The lines of the running micro-batch, the line that it is the last one, and the end.
    assert len(lines) - before <= 5, "\n".join(lines)
    (java,) = [int(line.split()[1]) for line in lines if line.startswith("java ")]
    while Path(f"/proc/{java}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
