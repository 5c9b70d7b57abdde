"""The lease: one driver at a time; a dead driver is taken over; a driver that lost its lease is told. In processes."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from miniplm_udf import lease, storage
from miniplm_udf.errors import CorpusError, MiniplmError
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease, is_held
from tests.support.full_disk import largest_file
from tests.support.right_experiment import Place
from tests.support.s3_server import BUCKET, S3Server

HOLD = """
import sys, time
from miniplm_udf import lease
lease._RENEW_SECONDS = 0.1
with lease.Lease(sys.argv[1], "score"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.1)
    if request.param == "local":
        return Root(f"file://{tmp_path}").lease("score")
    request.getfixturevalue("s3")
    return Root(f"s3a://{BUCKET}/{tmp_path.name}").lease("score")


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


@pytest.mark.slow
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
        record = storage.read_json(uri)
        storage.write_json(uri, {**record, "machine": "elsewhere", "host": "elsewhere"})
        with Lease(uri, "score") as second:
            second.check()
            with pytest.raises(
                CorpusError,
                match=r"did not renew its lease in time, and process .* has taken over\. All commits are kept\.",
            ):
                first.check()
        # The second holder has released the lease, so no record is left.
        assert lease.read(uri) is None


@pytest.mark.parametrize("text", [b"", b"\0\0", b"[1]", b'{"token": "a"}', b"\xff\xfe"])
def test_a_damaged_file_is_no_lease(uri: str, text: bytes) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(path, text)
    assert not is_held(uri)
    with Lease(uri, "score") as mine:
        mine.check()


def test_work_of_another_kind_is_named_as_such(uri: str, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(CorpusError, match=rf"small: the training is run by process {holder.pid} on "):
        Lease(uri, "small", what="training").__enter__()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_second_run_of_a_root_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before any work: no JVM is started. A dry run takes no lease."""
    from jobs import pipeline

    config = Place(tmp_path).file()
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, Root(f"file://{tmp_path}/root").lease("run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        assert pipeline.main(["-c", str(config)]) == 1
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert f"miniplm run: the pipeline is run by process {held.pid} on " in line
        assert pipeline.main(["-c", str(config), "--dry-run"]) == 0
    finally:
        held.kill()
        held.wait()


def test_one_of_many_takes_over_a_dead_holders_lease(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3, at the same moment, without a wait in which the others could find out."""
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.01)
    for trial in range(4):
        uri = Root(f"s3a://{BUCKET}/{trial}").lease("score")
        dead = lease.LeaseRecord("dead", 3, 2**22 + 1, "here", lease._machine())
        storage.write_json(uri, dataclasses.asdict(dead))
        start, events = threading.Barrier(4), list[str]()

        def take(uri: str = uri, start: threading.Barrier = start, events: list[str] = events) -> None:
            start.wait()
            try:
                with Lease(uri, "score") as mine:
                    events.append("takes")
                    time.sleep(0.05)
                    mine.check()
                    events.append("leaves")
            except CorpusError:
                events.append("refused")

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [event for event in events if event != "refused"]
        assert held
        assert held == ["takes", "leaves"] * (len(held) // 2), "two at the same time"


@pytest.mark.parametrize("uri", ["local"], indirect=True)
def test_a_lease_on_a_full_disk_is_one_line_and_leaves_no_file(uri: str, tmp_path: Path) -> None:
    with largest_file(10), pytest.raises(MiniplmError, match="the lease of the training small cannot be written"):
        Lease(uri, "small", what="training").__enter__()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
