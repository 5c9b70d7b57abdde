"""The lease: one driver at a time, a dead one's work taken over, a driver given up for dead told so. Real processes."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miniplm_udf.errors import CorpusError
from miniplm_udf.streams import lease
from miniplm_udf.streams.lease import Lease, is_held, lease_uri

HOLD = """
import sys, time
from miniplm_udf.streams import lease
lease._RENEW_SECONDS = 0.1
with lease.Lease(sys.argv[1], "score"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.1)
    return lease_uri(f"file://{tmp_path}", "score")


@pytest.fixture
def holder(uri: str) -> Iterator["subprocess.Popen[str]"]:
    made = subprocess.Popen([sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline() == "held\n"
    yield made
    made.kill()
    made.wait()


def test_a_second_driver_is_refused_and_told_by_whom(uri: str, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(CorpusError, match=rf"score: the query is run by process {holder.pid} on "), Lease(uri, "score"):
        pass
    assert is_held(uri)


def test_a_killed_driver_is_succeeded_at_once(uri: str, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    assert not is_held(uri)
    start = time.monotonic()
    with Lease(uri, "score") as mine:
        mine.check()
        assert is_held(uri)
    assert time.monotonic() - start < 5
    assert lease.read(uri) is None


def test_who_waits_has_it_when_the_other_lets_go(uri: str) -> None:
    first = Lease(uri, "score_matrix")
    first.__enter__()
    threading.Timer(1.0, first.__exit__, (None, None, None)).start()
    with Lease(uri, "score_matrix", waits=True) as second:
        second.check()


def test_a_silent_driver_of_another_machine_is_taken_over_and_finds_out(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 60.0)  # as silent as one that hangs
    with Lease(uri, "score") as first:
        path = Path(uri.removeprefix("file://"))
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "machine": "elsewhere", "host": "elsewhere"}))
        with Lease(uri, "score") as second:
            second.check()
            with pytest.raises(CorpusError, match="given up for dead; it is run by process"):
                first.check()
        # What it leaves behind is not the other's.
        assert lease.read(uri) is None


def test_of_two_that_take_it_at_once_one_has_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.5)
    outcomes: list[str] = []

    def take() -> None:
        try:
            with Lease(uri, "score"):
                outcomes.append("has it")
                time.sleep(1.0)
        except CorpusError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["has it", "refused"]
