"""Which GPU a process takes: slots that real processes share. A GPU is a name here."""

import contextlib
import json
import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.errors import ConfigError, ScoringError
from miniplm_udf.workers import gpu_slots, model_scorers
from miniplm_udf.workers.gpu_slots import device_numbers, keep_gpus, take_slot, wanted

# Takes GPUs for each line that it reads, and prints their numbers; keeps them until it ends.
PROCESS = """
import json, sys, tempfile
tempfile.tempdir = sys.argv[1]
from miniplm_udf.workers.gpu_slots import keep_gpus
for line in sys.stdin:
    print(json.dumps(keep_gpus(**json.loads(line))), flush=True)
"""


class GpuUser:
    """A process that takes GPUs when it is told to."""

    def __init__(self, node: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(node)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, names: str, slots: int | None = 1, several: bool = False, addresses: Sequence[str] = ()) -> None:
        request = {"names": list(names), "addresses": list(addresses), "slots": slots, "several": several}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[int]:
        assert self.process.stdout is not None
        numbers: list[int] = json.loads(self.process.stdout.readline())
        return numbers

    def take(self, names: str, slots: int | None = 1, several: bool = False) -> list[int]:
        self.ask(names, slots, several)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node on which no process has a GPU."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    return tmp_path


@contextlib.contextmanager
def users(node: Path, n: int) -> Iterator[list[GpuUser]]:
    started = [GpuUser(node) for _ in range(n)]
    try:
        yield started
    finally:
        for user in started:
            user.kill()


def test_each_process_takes_the_first_free_gpu_and_the_message_names_who_has_them(node: Path) -> None:
    with users(node, 3) as started:
        assert [user.take("abc") for user in started] == [[0], [1], [2]]
        assert [user.take("abc") for user in started] == [[0], [1], [2]], "the same GPU for the next model"
        first, second, third = (user.process.pid for user in started)
        with pytest.raises(
            ScoringError, match=f"a by process {first}, b by process {second}, c by process {third};.*score.workers"
        ):
            take_slot("abc", 1, 0.0)
        started[1].kill()
        assert keep_gpus("abc", [], 1, False) == [1], "the GPU of a process that was killed is free"
        assert keep_gpus("abc", [], 1, False) == [1]


def test_gpus_are_shared_only_when_each_has_a_process(node: Path) -> None:
    with users(node, 4) as started:
        assert [user.take("ab", 2) for user in started] == [[0], [1], [0], [1]]
        with pytest.raises(ScoringError, match=f"a by process {started[0].process.pid} and {started[2].process.pid}"):
            take_slot("ab", 2, 0.0)


def test_any_number_of_processes_spread_and_never_wait(node: Path) -> None:
    with users(node, 5) as started:
        assert [user.take("ab", None) for user in started] == [[0], [1], [0], [1], [0]]


def test_an_assigned_gpu_is_waited_for_although_another_is_free(node: Path) -> None:
    with users(node, 2) as (first, second):
        first.ask("ab", addresses=["1"])
        assert first.answer() == [1]
        second.ask("ab", addresses=["1"])
        assert keep_gpus("ab", [], 1, False) == [0], "the second process did not take it"
        first.kill()
        assert second.answer() == [1]


def test_processes_that_each_have_a_gpu_and_want_all_do_not_wait_for_each_other(node: Path) -> None:
    with users(node, 2) as (first, second):
        assert [first.take("ab"), second.take("ab")] == [[0], [1]]
        first.ask("ab", several=True)
        second.ask("ba", several=True)  # it sees the GPUs in another order
        ready, _, _ = select.select([first.process.stdout, second.process.stdout], [], [], 30)
        assert ready, "the two processes wait for each other"
        one, other = (first, second) if ready == [first.process.stdout] else (second, first)
        assert one.answer() == [0, 1]
        one.kill()
        assert other.answer() == [0, 1]


def test_a_process_gives_back_the_gpus_that_its_next_models_do_not_need(node: Path) -> None:
    with users(node, 1) as (user,):
        assert user.take("abc", several=True) == [0, 1, 2]
        assert user.take("abc", several=True) == [0, 1, 2]
        with pytest.raises(ScoringError, match="all GPUs have been taken"):
            take_slot("abc", 1, 0.0)
        assert user.take("abc") == [0]
        assert keep_gpus("abc", [], 1, False) == [1]


def test_a_process_that_does_not_get_all_gpus_keeps_none(node: Path) -> None:
    with users(node, 2) as (first, second):
        assert [first.take("ab"), second.take("ab")] == [[0], [1]]
        first.kill()
        with pytest.raises(ScoringError, match=f"b by process {second.process.pid};"):
            keep_gpus("ab", [], 1, True, 0.0)
        assert gpu_slots.kept_gpus("ab") == []
        take_slot("a", 1, 0.0)[1].close()


@pytest.mark.parametrize("workers_per_gpu", [1, 2, None])
def test_workers_that_would_each_take_all_gpus_of_a_machine_are_refused(
    node: Path, monkeypatch: pytest.MonkeyPatch, workers_per_gpu: int | None
) -> None:
    settings = ScoreConfig(workers=2, workers_per_gpu=workers_per_gpu)
    monkeypatch.setattr(gpu_slots, "_ASSIGNED", [])
    with pytest.raises(ConfigError, match=r"score\.workers: expected 1, .*found 2; set score\.workers to 1"):
        model_scorers._take_gpus(["a", "b"], settings, True, 0)
    assert model_scorers._take_gpus([], settings, True, 0) == (["cpu"], []), "a machine without GPUs has no conflict"
    one = ScoreConfig(workers=1, workers_per_gpu=workers_per_gpu)
    assert model_scorers._take_gpus(["a", "b"], one, True, 0) == (["cuda:0", "cuda:1"], ["a", "b"])
    monkeypatch.setattr(gpu_slots, "_ASSIGNED", ["1"])
    assert model_scorers._take_gpus(["a", "b"], settings, True, 0) == (["cuda:1"], ["b"])


def test_a_process_prefers_the_gpus_that_are_named_first(node: Path) -> None:
    def rank(names: Sequence[str]) -> tuple[list[str], list[str]]:
        return ["c", "b"], [name for name in names if name not in "bc"]

    with users(node, 3) as started:
        assert [user.take("abc", 2) for user in started] == [[0], [1], [2]]
        started[2].kill()
        assert keep_gpus("abc", [], 1, False, 0.0, rank) == [2]
        gpu_slots.give_back(["c", "not kept"])
        assert gpu_slots.kept_gpus("abc") == []
        with contextlib.closing(take_slot("c", 1, 0.0)[1]):
            with pytest.raises(ScoringError, match=r"c by process \d+, b by process \d+, a by process"):
                keep_gpus("abc", [], 1, False, 0.0, rank)
            started[0].kill()
            assert keep_gpus("abc", [], 2, False, 0.0, rank) == [2], "rather shared than the GPU that is named last"
            gpu_slots.give_back("c")
            assert keep_gpus("abc", [], 1, False, 0.0, rank) == [0]


def test_the_wait_for_several_gpus_has_one_limit(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def noted(names: Sequence[str], slots: int | None, patience_seconds: float) -> tuple[str, IO[str]]:
        limits.append(patience_seconds)
        return take_slot(names, slots, patience_seconds)

    monkeypatch.setattr(gpu_slots, "take_slot", noted)
    monkeypatch.setattr(gpu_slots, "_CHECK_EVERY_SECONDS", 0.05)
    with users(node, 1) as (user,):
        assert user.take("a") == [0]
        timer = threading.Timer(0.3, user.kill)
        timer.start()
        assert keep_gpus("ab", [], 1, True, 60.0) == [0, 1]
        timer.join()
    assert limits[0] == pytest.approx(60, abs=0.1)
    assert limits[1] < 59.8


@pytest.mark.parametrize(
    ("settings", "addresses", "warnings"),
    [
        (ScoreConfig(workers=1), [], 1),
        (ScoreConfig(workers=2), [], 0),
        (ScoreConfig(workers=1, workers_per_gpu=None), [], 0),
        (ScoreConfig(workers=1), ["0"], 0),
    ],
)
def test_fewer_workers_than_gpus_are_logged_once(
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: ScoreConfig,
    addresses: list[str],
    warnings: int,
) -> None:
    monkeypatch.setattr(gpu_slots, "_ASSIGNED", addresses)
    with caplog.at_level(logging.WARNING, "miniplm.workers"):
        for _ in range(2):  # two models of one process
            assert model_scorers._take_gpus(["a", "b"], settings, False, 0) == (["cuda:0"], ["a"])
    assert [record.message.startswith("score.workers is 1") for record in caplog.records] == [True] * warnings


def test_a_process_that_waits_makes_idle_processes_of_each_gpu_end(node: Path) -> None:
    assert keep_gpus("ab", [], 1, True) == [0, 1]
    assert gpu_slots.kept_gpus("ab") == [0, 1]
    assert not gpu_slots.kept_slot_is_wanted()
    with wanted("b"):
        assert gpu_slots.kept_slot_is_wanted()
    assert not gpu_slots.kept_slot_is_wanted()
    with users(node, 1) as (user,):
        user.ask("ab")
        for name in "ab":
            seen = {name: gpu_slots._KEPT[name]}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu_slots, "_KEPT", seen)
                deadline = time.monotonic() + 30
                while not gpu_slots.kept_slot_is_wanted():
                    assert time.monotonic() < deadline, f"nobody asks for {name}"
                    time.sleep(0.05)


# Asks again and again, as an idle process does, and prints how often another process seemed to wait.
ASKING = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from miniplm_udf.workers.gpu_slots import keep_gpus, kept_slot_is_wanted
keep_gpus(["a"], [], None, False)
print("ready", flush=True)
end = float(sys.stdin.readline())
answers = [kept_slot_is_wanted() for _ in iter(lambda: time.monotonic() < end, False)]
print(len(answers), sum(answers))
"""


def test_idle_processes_do_not_take_each_other_for_one_that_waits(node: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASKING, str(node)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["ready\n"] * 3
    end = time.monotonic() + 0.5
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{end}\n")
        process.stdin.flush()
    answers = [process.communicate()[0].split() for process in processes]
    assert [wanted for _, wanted in answers] == ["0"] * 3
    assert all(int(number) > 10 for number, _ in answers)


@pytest.mark.parametrize(
    ("addresses", "numbers"),
    [
        ([], [0, 1, 2, 3]),
        (["2"], [2]),
        (["1", "3"], [1, 3]),
        (["GPU-uuid2"], [2]),
        # The resource manager shows only the assigned GPUs, whose addresses are those of the machine.
        (["7"], [0]),
        (["3", "4"], [0, 1]),
        (["GPU-another"], [0]),
        ([str(number) for number in range(10, 15)], [0, 1, 2, 3]),
    ],
)
def test_device_numbers_of_addresses(addresses: list[str], numbers: list[int]) -> None:
    assert device_numbers([f"uuid{number}" for number in range(4)], addresses) == numbers
