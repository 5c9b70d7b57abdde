"""A signal ends a process with one line and 128 + its number; a second one, or a stuck end, at once. Real processes."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import trainer_process
from jobs.trainer_process import run_trainer
from miniplm_udf.errors import MiniplmError

COMMAND = """
import signal, sys, time
from pathlib import Path
from jobs.command import guarded
from miniplm_udf.lease import Lease

# A command that a shell starts in the background ignores SIGINT, and so would this one.
signal.signal(signal.SIGINT, signal.default_int_handler)

def body():
    with Lease(sys.argv[1], "work"):
        print("at work", flush=True)
        try:
            time.sleep(60)
        finally:
            time.sleep(float(sys.argv[2]))

sys.exit(guarded(body))
"""

PARENT = """
import sys
from jobs import trainer_process
from jobs.command import guarded

class Popen(trainer_process.subprocess.Popen):
    def __init__(self, line, **options):
        child = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(60)"
        super().__init__([sys.executable, "-c", child], **options)
        print(self.pid, flush=True)

trainer_process.subprocess.Popen = Popen
sys.exit(guarded(lambda: trainer_process.run_trainer("train", "c.yaml", [])))
"""


def start(code: str, *arguments: str) -> "tuple[subprocess.Popen[str], str]":
    made = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    return made, made.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_one_line_and_the_lease_is_given_back(tmp_path: Path, number: signal.Signals) -> None:
    lease = tmp_path / "lease.json"
    command, _ = start(COMMAND, f"file://{lease}", "0")
    assert lease.exists()
    command.send_signal(number)
    line = f"miniplm: stopped by {number.name}; run the same command again to continue\n"
    assert command.communicate(timeout=60)[1] == line
    assert command.returncode == 128 + number
    assert not lease.exists()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    command, _ = start(COMMAND, f"file://{tmp_path}/lease.json", "60")
    for _ in range(2):
        command.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert command.wait(30) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_trainer_ends_with_its_parent() -> None:
    command, child = start(PARENT)
    time.sleep(0.5)
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


DEFERRED = """
import sys, time
from miniplm_udf import stopping

stopping._SAME_REQUEST_SECONDS = float(sys.argv[1])
with stopping.stops_on_signals():
    with stopping.deferred():
        print("at work", flush=True)
        while stopping.received() is None:
            time.sleep(0.01)
        print("asked to stop", flush=True)
        time.sleep(float(sys.argv[2]))
        print(f"{stopping.received().message}", flush=True)
    sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_that_defers_signals_ends_by_itself(number: signal.Signals) -> None:
    work, _ = start(DEFERRED, "60", "1")
    for _ in range(2):  # from the terminal, and from the parent
        work.send_signal(number)
    line = f"stopped by {number.name}; run the same command again to continue\n"
    assert work.communicate(timeout=60) == (f"asked to stop\n{line}", "")
    assert work.returncode == 7


def test_a_later_second_signal_ends_deferring_work_at_once() -> None:
    work, _ = start(DEFERRED, "0", "60")
    assert work.stdout is not None
    work.send_signal(signal.SIGTERM)
    assert work.stdout.readline() == "asked to stop\n"
    work.send_signal(signal.SIGTERM)
    assert work.wait(30) == 128 + signal.SIGTERM


def test_a_signal_to_the_trainer_alone_does_not_pass_for_a_finished_training(monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.dumps({"small": {"name": "small", "skipped": False, "stopped_after": 30}})
    monkeypatch.setattr(trainer_process.subprocess, "Popen", functools.partial(_popen_that_prints, result))
    with pytest.raises(MiniplmError, match=r"^small: a signal stopped its training after step 30, which is saved"):
        run_trainer("train", "c.yaml", [])
    monkeypatch.setattr(trainer_process.subprocess, "Popen", functools.partial(_popen_that_prints, '{"small": {}}'))
    run_trainer("train", "c.yaml", [])


_POPEN = subprocess.Popen


def _popen_that_prints(text: str, line: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    return _POPEN(["echo", text], **options)
