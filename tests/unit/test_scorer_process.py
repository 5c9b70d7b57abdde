"""The scorer process and its client, without Spark: models kept, deaths that lose nothing, and an end in time."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from miniplm_udf.errors import ConfigError, ModelLoadError, ScoringError
from miniplm_udf.workers import gpu_slots, process_slots, scorer_connection, scorer_process
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.scorer_client import MAX_DEATHS
from miniplm_udf.workers.scorer_process import Lifetime
from miniplm_udf.workers.scorer_wire import TaskFailed, Wire
from tests.support.crashing_scorer import CrashingFactory, Unloadable, made, pids, scored
from tests.support.scorer_requests import is_gone, request, run, texts_of, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node of the test's own: no places, and so no processes, of others. Its path has room for a socket's."""
    tmp_path_factory.getbasetemp()  # of the whole run, and so not in the test's node
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="node-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    log = tmp_path / "log"
    yield log
    for pid in pids(log):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check(rows: Sequence[dict[str, Any]], texts: Sequence[str], bad: Sequence[str] = (), factor: float = 1.0) -> None:
    """Checks that there is one row for each text, in order, with its score; texts in `bad` have no score."""
    assert [row["instance_id"] for row in rows] == [f"id{n}" for n in range(len(texts))]
    for row, text in zip(rows, texts, strict=True):
        if text in bad:
            assert (row["nll_sum_nats"], row["reason"]) == (None, "scorer_crashed")
        else:
            assert (row["nll_sum_nats"], row["reason"]) == (factor * sum(text.encode()), None)


def test_a_model_is_kept_between_tasks_and_makes_room_for_another(log: Path) -> None:
    teacher, reference = CrashingFactory(1.0, log), CrashingFactory(2.0, log)
    texts = texts_of(20)
    for _ in range(3):
        check(run({"teacher": teacher}, texts), texts)
    assert [factor for factor, _ in made(log)] == [1.0]
    both = run({"teacher": teacher, "reference": reference}, texts)
    check([row for row in both if row["model_id"] == "teacher"], texts)
    check([row for row in both if row["model_id"] == "reference"], texts, factor=2.0)
    assert [factor for factor, _ in made(log)] == [1.0, 2.0]
    check(run({"student": CrashingFactory(3.0, log)}, texts), texts, factor=3.0)
    check(run({"teacher": teacher}, texts), texts)
    assert [factor for factor, _ in made(log)] == [1.0, 2.0, 3.0, 1.0]
    assert len(set(pids(log))) == 1


def test_tasks_at_once_have_a_process_each_and_find_their_models_again(log: Path) -> None:
    factories = [{"teacher": CrashingFactory(factor, log)} for factor in (1.0, 2.0)]
    texts = texts_of(30)
    for order in ([0, 1], [1, 0]):
        tasks = {n: score_arrow(factories[n])(iter([request(texts)])) for n in order}
        first = {n: next(tasks[n]).to_pylist() for n in order}
        for n in order:
            rest = [row for out in tasks[n] for row in out.to_pylist()]
            check([*first[n], *rest], texts, factor=n + 1.0)
    assert sorted(factor for factor, _ in made(log)) == [1.0, 2.0]
    assert len(set(pids(log))) == 2


@pytest.mark.parametrize(
    ("n", "bad_rows"),
    [
        (1, [0]),
        (33, [12]),
        pytest.param(2, [1], marks=pytest.mark.slow),
        pytest.param(33, [0], marks=pytest.mark.slow),
        pytest.param(40, [5, 6, 38], marks=pytest.mark.long),
    ],
)
def test_a_text_that_kills_the_process_is_found_and_the_rest_is_scored(log: Path, n: int, bad_rows: list[int]) -> None:
    texts = [f"kill {i}" if i in bad_rows else text for i, text in enumerate(texts_of(n))]
    bad = [texts[row] for row in bad_rows]
    total = ScoreCounts()
    rows = run({"a": CrashingFactory(1.0, log), "b": CrashingFactory(2.0, log)}, texts, total)
    for alias, factor in (("a", 1.0), ("b", 2.0)):
        check([row for row in rows if row["model_id"] == alias], texts, bad, factor)
        counts = total.models[alias]
        assert (counts.n_scored, counts.n_failed) == (n - len(bad), len(bad))
        assert counts.n_tokens == sum(len(text) for text in texts if text not in bad)
    killed = [row for row in rows if row["reason"]]
    assert all("killed by SIGKILL, perhaps by the kernel for lack of memory" in row["detail"] for row in killed)
    assert {(row["instance_id"], row["model_id"]) for row in killed} == {failed[:2] for failed in total.failed}
    # Slices of about six texts: on its way, alone, halved to one.
    assert len(set(pids(log))) <= 1 + 6 * len(bad)


def test_a_death_that_does_not_repeat_costs_the_repetition(log: Path) -> None:
    texts = ["once" if n == 20 else text for n, text in enumerate(texts_of(36))]
    total = ScoreCounts()
    rows = run({"teacher": CrashingFactory(1.0, log)}, texts, total)
    check(rows, texts)
    assert (total.models["teacher"].n_scored, total.failed) == (36, [])
    assert len(pids(log)) == 2
    # Slices that were answered are not scored again.
    assert [scored(log).count(text) for text in texts[:5]] == [1] * 5


def test_a_text_alone_is_given_up_only_where_it_kills_again(log: Path) -> None:
    """It dies on its way, and asked again alone; the second of these is not enough to tell the text from the time."""
    check(run({"teacher": CrashingFactory(1.0, log)}, ["twice"]), ["twice"])
    assert len(pids(log)) == 3


def test_a_process_that_died_between_tasks_is_replaced_on_its_socket(log: Path) -> None:
    texts = texts_of(3)
    check(run({"teacher": CrashingFactory(1.0, log)}, texts), texts)
    os.kill(pids(log)[0], signal.SIGKILL)
    wait_until(lambda: is_gone(pids(log)[0]))
    check(run({"teacher": CrashingFactory(1.0, log)}, texts), texts)
    assert len(set(pids(log))) == 2


def test_an_error_of_cuda_is_a_death(log: Path) -> None:
    texts = [*texts_of(9), "cuda", *texts_of(4)]
    rows = run({"teacher": CrashingFactory(1.0, log)}, texts)
    check(rows, texts, ["cuda"])
    assert "exit code 70" in rows[9]["detail"]
    assert "RuntimeError: CUDA error: device-side assert triggered" in rows[9]["detail"]


@pytest.mark.long
def test_a_machine_that_kills_everything_is_an_error_and_stays_known(log: Path) -> None:
    factories = {"teacher": CrashingFactory(1.0, log)}
    with pytest.raises(ScoringError, match=f"died {MAX_DEATHS} times and scored nothing.*SIGKILL"):
        run(factories, [f"kill {text}" for text in texts_of(30)])
    assert len(pids(log)) == MAX_DEATHS
    # On a machine where every process dies, a task with one text does not reject that text.
    with pytest.raises(ScoringError, match=f"died {MAX_DEATHS + 1} times"):
        run(factories, ["kill"])
    check(run(factories, texts_of(2)), texts_of(2))
    check(run(factories, ["kill"]), ["kill"], ["kill"])


def test_deaths_while_loading(log: Path) -> None:
    texts = texts_of(3)
    check(run({"teacher": CrashingFactory(1.0, log, "die once")}, texts), texts)
    with pytest.raises(ModelLoadError, match=r"died during loading teacher, 2 times: killed by SIGKILL"):
        run({"teacher": CrashingFactory(2.0, log, "die")}, texts)


def test_errors_of_loading_come_with_their_class(log: Path) -> None:
    with pytest.raises(ConfigError, match="context_tokens: too many"):
        run({"teacher": CrashingFactory(1.0, log, "ConfigError")}, texts_of(1))
    with pytest.raises(ModelLoadError, match="teacher: cannot be loaded: ValueError: no weights"):
        run({"teacher": CrashingFactory(2.0, log, "ValueError")}, texts_of(1))
    assert len(set(pids(log))) == 1, "an error ends no process"


def test_what_cannot_be_unpickled_is_told() -> None:
    with pytest.raises(ScoringError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        run({"teacher": Unloadable()}, texts_of(1))


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    (tmp_path / "miniplm_udf").mkdir()
    (tmp_path / "miniplm_udf/__init__.py").write_text("raise ImportError('a half of an installation')")
    monkeypatch.setattr(scorer_connection, "_path", lambda: [str(tmp_path)])
    with pytest.raises(ModelLoadError, match="during its start, 2 times: ended with exit code 1"):
        run({"teacher": CrashingFactory(1.0, log)}, texts_of(1))


def test_work_of_a_worker_that_is_gone_is_dropped(log: Path) -> None:
    """As the process sees it: the connection ends while slices are unanswered."""
    texts = [f"slow {n:02d}" for n in range(60)]  # fifteen a slice: a second and a half
    task = score_arrow({"teacher": CrashingFactory(1.0, log)})(iter([request(texts)]))
    next(task)
    task.close()  # type: ignore[attr-defined]
    start = time.monotonic()
    check(run({"teacher": CrashingFactory(1.0, log)}, texts_of(5)), texts_of(5))
    assert time.monotonic() - start < 1.0
    assert len(scored(log)) < 30
    assert len(pids(log)) == 1


def test_no_more_is_read_than_a_few_slices(log: Path) -> None:
    taken = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield request(["x" * 100])

    task = score_arrow({"teacher": CrashingFactory(1.0, log)})(source())
    for n in range(1, 20):
        next(task)
        time.sleep(0.01)
        assert taken <= n + 8
    assert len(list(task)) == 481


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_it_ends_within_two_seconds_of_its_owner(log: Path, how: str) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.support.crashing_scorer import CrashingFactory\n"
        "from tests.support.scorer_requests import run, texts_of\n"
        "run({'teacher': CrashingFactory(1.0, Path(sys.argv[1]))}, texts_of(2)); print('done', flush=True); input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    assert owner.stdout.readline() == b"done\n"
    (pid,) = pids(log)
    time.sleep(1.2)
    assert not is_gone(pid)
    if how == "kill":
        # Nobody asks for its exit status yet, as where an executor's parent is slow.
        owner.kill()
    else:
        owner.stdin.write(b"\n")
        owner.stdin.close()
    assert wait_until(lambda: is_gone(pid)) < 2
    owner.wait()
    owner.stdout.close()


def test_reasons_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    monkeypatch.setattr("miniplm_udf.workers.scorer_process._DAEMON_SECONDS", 0.05)
    life = Lifetime(os.getpid(), idle_seconds=0.3)
    assert life.reason_to_end() is None
    daemon = subprocess.Popen(["sleep", "60"])
    life.connected(daemon.pid)
    time.sleep(0.4)
    assert life.reason_to_end() is None, "a worker is connected"
    life.disconnected()
    time.sleep(0.1)
    assert life.reason_to_end() is None, "the daemon lives"
    daemon.kill()
    daemon.wait()
    assert life.reason_to_end() == "the Spark session is gone"
    life.connected(os.getpid())
    life.disconnected()
    assert life.reason_to_end() is None
    time.sleep(0.4)
    assert "no task has come" in str(life.reason_to_end())
    life.connected(os.getpid())
    life.lost_worker()
    assert life.worker_is_gone()
    assert life.reason_to_end() is None, "it is about to let go of the work"
    monkeypatch.setattr("miniplm_udf.workers.scorer_process._DROP_SECONDS", 0.0)
    assert "still busy with the work" in str(life.reason_to_end())
    owner = subprocess.Popen(["sleep", "60"])
    life = Lifetime(owner.pid)
    life.connected(os.getpid())
    assert life.reason_to_end() is None
    owner.kill()
    wait_until(lambda: life.reason_to_end() == "its executor is gone")
    owner.wait()


def test_an_idle_process_gives_way_to_one_that_waits_for_its_gpu(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    gpu_slots.keep_gpus(["gpu"], [], 1, False)
    life = Lifetime(os.getpid())
    assert life.reason_to_end() is None
    code = f"import tempfile; tempfile.tempdir = {str(node)!r}; from miniplm_udf.workers import gpu_slots\n"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code + "gpu_slots.take_slot(['gpu'], 1); print('taken', flush=True)"]
    )
    wait_until(lambda: life.reason_to_end() is not None)
    assert life.reason_to_end() == "another process waits for its GPU"
    gpu_slots._KEPT["gpu"].close()
    assert waiting.wait(10) == 0


def test_places_are_private_and_their_sockets_short(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (node / f"miniplm-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ScoringError, match="only this user can read"):
        process_slots.take_scorer_slot(["a"])
    long = node / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with contextlib.closing(process_slots.take_scorer_slot(["a"])) as place:
        assert len(str(place.socket)) < 100
        assert place.socket.parent.stat().st_mode & 0o777 == 0o700


def test_each_gpu_has_places_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slots, "_ASSIGNED", [])
    sockets = set()
    for addresses in (["0"], ["1"], ["0", "1"], ["GPU-8f6a7c3e-1234-5678-9abc-def012345678"], []):
        gpu_slots.assign_gpus(addresses)
        with contextlib.closing(process_slots.take_scorer_slot(["a"])) as place:
            assert place.gpus == gpu_slots.gpu_addresses() == addresses
            sockets.add(place.socket)
    assert len(sockets) == 5


def test_an_error_that_cannot_be_sent_keeps_its_text() -> None:
    class LocalError(ScoringError):
        pass

    ours, theirs = socket.socketpair()
    with contextlib.closing(Wire(ours)) as sender, contextlib.closing(Wire(theirs)) as receiver:
        scorer_process._tell(sender, TaskFailed(LocalError("the text")))
        message = receiver.receive()
    assert isinstance(message, TaskFailed)
    assert (type(message.error), str(message.error)) == (ScoringError, "LocalError: the text")
