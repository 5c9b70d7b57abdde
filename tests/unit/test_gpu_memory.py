"""GPUs that other programs hold: when a model is loaded, waited for or refused, and what the messages say.

No GPU is here: the memory of one is a number that a test says, or that depends on whether a real process is alive.
`nvidia-smi` is a script on the PATH.
"""

import contextlib
import getpass
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.errors import ModelLoadError, ScoringError
from miniplm_udf.workers import gpu_memory, gpu_slots, model_scorers
from miniplm_udf.workers.gpu_holders import (
    GpuProcess,
    free_memory,
    gpu_processes,
    holders,
    parse_processes,
    program_of,
)
from miniplm_udf.workers.gpu_memory import GpuMemory, by_room, held_by_others, is_taken, load_when_free, room
from miniplm_udf.workers.gpu_slots import other_users, take_slot

GIB = 1024**3
UUID = "8f6a7c3e-1234-5678-9abc-def012345678"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80.00 GiB"


def gpu(free: float, total: float = 80, own: float = 0, siblings: float = 0) -> GpuMemory:
    return GpuMemory(UUID, int(free * GIB), int(total * GIB), int(own * GIB), int(siblings * GIB))


@pytest.mark.parametrize(
    ("gpus", "gib", "expected"),
    [
        ([gpu(80)], 79, "now"),
        ([gpu(80)], 79.5, "never"),  # the weights fit, and no forward pass
        ([gpu(10)], 9, "now"),
        ([gpu(10)], 9.5, "later"),
        ([gpu(10, own=60)], 18, "later"),
        ([gpu(10, own=60)], 20, "never"),
        ([gpu(80), gpu(80)], 158, "now"),
        ([gpu(80), gpu(0.5)], 79, "now"),
        ([gpu(80), gpu(0.5)], 80, "later"),
        ([gpu(80), gpu(80)], 159, "never"),
        ([gpu(0.5)], 0, "now"),
        ([gpu(80, siblings=50)], 29, "now"),  # the other scorer process is about to load its model
        ([gpu(80, siblings=50)], 30, "later"),
        ([gpu(30, siblings=40)], 29, "now"),
        ([gpu(30, siblings=40)], 30, "later"),
        ([gpu(80, siblings=50), gpu(80, siblings=50)], 58, "now"),
        ([gpu(80, siblings=50), gpu(80, siblings=50)], 59, "later"),
    ],
)
def test_when_a_model_fits(gpus: list[GpuMemory], gib: float, expected: str) -> None:
    assert room(gpus, int(gib * GIB)) == expected


def test_what_others_hold() -> None:
    assert not held_by_others([gpu(79.5), gpu(20, own=59.5)])
    assert held_by_others([gpu(79.5), gpu(50)])
    assert held_by_others([gpu(79.5, siblings=1)])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(FULL), True),
        (RuntimeError(BUSY), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (ModelLoadError(f"/m: cannot be loaded as a causal LM: OutOfMemoryError: {FULL}"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError("out of memory"), False),
        (ModelLoadError("/m: 3 missing tensors"), False),
    ],
)
def test_errors_of_a_taken_gpu(error: BaseException, expected: bool) -> None:
    assert is_taken(error) is expected


def test_the_lines_of_nvidia_smi() -> None:
    text = f"""GPU-{UUID}, 4711, 70112 MiB, /opt/conda/bin/python
GPU-{UUID}, 12, [N/A], [Not Found]
MIG-1, 13, 5 MiB, a, b
No running processes found
"""
    assert parse_processes(text) == [
        GpuProcess(UUID, 4711, "70112 MiB", "/opt/conda/bin/python"),
        GpuProcess(UUID, 12, "[N/A]", "[Not Found]"),
        GpuProcess("MIG-1", 13, "5 MiB", "a, b"),
    ]
    assert parse_processes("") == []


# --- with a process that holds the GPU ---


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_memory, "_CHECK_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(gpu_memory, "_RETRY_SECONDS", 0.05)
    return tmp_path


def write_smi(node: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi that runs a script."""
    path = node / "bin/nvidia-smi"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def list_holders(node: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """An nvidia-smi that knows two GPUs and lists processes: `GPU, pid, memory, program`."""
    script = (
        'case "$*" in\n'
        f"*query-compute-apps=gpu_uuid,pid,used_memory,name*csv,noheader*) echo '{chr(10).join(lines)}';;\n"
        f"*query-gpu=uuid,memory.free*csv,noheader*) printf 'GPU-{UUID}, 10240 MiB\\nGPU-another, [N/A]\\n"
        "GPU-free, 81000 MiB\\n';;\nesac"
    )
    write_smi(node, monkeypatch, script)


def line(pid: int, name: str = sys.executable, gpu: str = UUID) -> str:
    return f"GPU-{gpu}, {pid}, 70112 MiB, {name}"


@pytest.fixture
def holder(node: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of another program, which nvidia-smi lists."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "--password=secret", "-pSECRET"])
    list_holders(node, monkeypatch, line(process.pid), line(1, "init", "another"))
    yield process
    process.kill()
    process.wait()


def memory_of(process: "subprocess.Popen[bytes]") -> Callable[[], list[GpuMemory]]:
    """A GPU of 80 GiB, of which the process holds 70 as long as it lives."""
    return lambda: [gpu(10 if process.poll() is None else 80)]


def test_the_holder_is_named_with_its_user_and_program(
    node: Path, monkeypatch: pytest.MonkeyPatch, holder: "subprocess.Popen[bytes]"
) -> None:
    assert holders([UUID]) == (
        f"it is held by process {holder.pid} of {getpass.getuser()} ({sys.executable} -c, 70112 MiB)"
    )
    # In a container the number may belong to another process.
    list_holders(node, monkeypatch, line(holder.pid, "/usr/bin/trainer"))
    assert holders([UUID]) == f"it is held by process {holder.pid} (/usr/bin/trainer, 70112 MiB)"
    list_holders(node, monkeypatch, line(2**30, "[Not Found]"))
    assert holders([UUID]) == f"it is held by process {2**30} ([Not Found], 70112 MiB)"


def test_processes_of_other_gpus_and_this_process_are_not_named(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_holders(node, monkeypatch, line(os.getpid()), line(7), line(8, gpu="another"))
    assert [process.pid for process in gpu_processes([UUID]) or ()] == [7]
    assert [process.pid for process in gpu_processes([UUID, "another"]) or ()] == [7, 8]
    # The holder is in another container.
    list_holders(node, monkeypatch, line(os.getpid()), line(8, gpu="another"))
    assert gpu_processes([UUID]) == []
    assert "lists no other process" in holders([UUID])
    # A part of a GPU has a name of its own, which nvidia-smi does not know.
    assert [process.pid for process in gpu_processes(["a part of a GPU"]) or ()] == [8]


def test_a_scorer_process_is_named_as_one(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "miniplm_udf.workers.scorer_process"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node / "socket"))
        listener.listen()
        command = [
            sys.executable,
            "-P",
            "-m",
            module,
            "--listener",
            str(listener.fileno()),
            "--owner",
            str(os.getpid()),
        ]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        list_holders(node, monkeypatch, line(process.pid))
        user = getpass.getuser()
        assert holders([UUID]) == (
            f"it is held by scorer process {process.pid} of {user} ({sys.executable} -m {module}, 70112 MiB)"
        )
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("trainer", "trainer"),
        ("trainer -pSECRET", "trainer"),
        ("trainer SECRET", "trainer"),
        ("/bin/python3", "/bin/python3"),
        ("/bin/python3 -pSECRET", "/bin/python3"),
        ("/bin/python3 -pmSECRET", "/bin/python3"),
        ("/bin/python3 --password=SECRET", "/bin/python3"),
        ("/bin/python3 train.py SECRET", "/bin/python3 train.py"),
        ("/bin/python3 -u train.py --password SECRET", "/bin/python3 train.py"),
        ("python -W error -Xdev -X utf8 train.py", "python train.py"),
        ("python -P -m pkg.train SECRET", "python -m pkg.train"),
        ("python -Im pkg.train SECRET", "python -m pkg.train"),
        ("python -mpkg.train SECRET", "python -m pkg.train"),
        ("python -c SECRET SECRET", "python -c"),
        ("python -Ic SECRET", "python -c"),
        ("python -cSECRET SECRET", "python -c"),
        ("python -m", "python -m "),
    ],
)
def test_a_command_is_shown_without_its_arguments(command: str, expected: str) -> None:
    assert program_of(command.split()) == expected


def test_the_free_memory_that_nvidia_smi_lists(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_holders(node, monkeypatch)
    assert free_memory() == {UUID: 10 * GIB, "free": 81000 * 1024**2}


def test_without_nvidia_smi_the_holders_are_unknown(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(node, monkeypatch, "echo 'Failed to initialize NVML'; exit 9")
    assert gpu_processes([UUID]) is None
    assert free_memory() == {}
    write_smi(node, monkeypatch, "exit 0")
    assert "lists no other process" in holders([UUID])
    monkeypatch.setenv("PATH", str(node))
    assert "cannot be run" in holders([UUID])


def test_a_gpu_that_is_held_is_waited_for(
    node: Path, holder: "subprocess.Popen[bytes]", caplog: pytest.LogCaptureFixture
) -> None:
    def measure() -> list[GpuMemory]:
        if caplog.records:
            holder.kill()
            holder.wait()
        return memory_of(holder)()

    with caplog.at_level(logging.WARNING, "miniplm.workers"):
        assert load_when_free(lambda: holder.poll(), measure, [UUID], 50 * GIB, "teacher") == -9
    assert len(caplog.records) == 1
    assert f"waiting: models.teacher: GPU {UUID}" in caplog.text
    assert "10.0 GiB are free, expected 50.0 GiB" in caplog.text
    assert f"process {holder.pid} of" in caplog.text


def test_a_gpu_that_becomes_free_right_after_it_was_measured_is_used(node: Path) -> None:
    free = iter([10, 80])
    assert load_when_free(lambda: "loaded", lambda: [gpu(next(free))], [UUID], 50 * GIB, "teacher") == "loaded"


def test_a_gpu_that_stays_held_is_refused_by_name(node: Path, holder: "subprocess.Popen[bytes]") -> None:
    with pytest.raises(ScoringError, match=rf"process {holder.pid} of .* 70112 MiB.*CUDA_VISIBLE_DEVICES"):
        load_when_free(time.monotonic, memory_of(holder), [UUID], 50 * GIB, "teacher", 0.2)


def test_a_gpu_that_is_too_small_is_refused_at_once(node: Path) -> None:
    with pytest.raises(
        ModelLoadError,
        match=r"models\.teacher: expected 140\.0 GiB .* found GPUs of 80\.0 GiB .*dtype.*device_map: auto.*openai",
    ):
        load_when_free(time.monotonic, lambda: [gpu(80)], [UUID], 140 * GIB, "teacher")
    with pytest.raises(ModelLoadError, match=r"found GPUs of 80\.0 \+ 80\.0 GiB") as raised:
        load_when_free(time.monotonic, lambda: [gpu(80), gpu(80)], [UUID, "b"], 200 * GIB, "teacher")
    assert "device_map" not in str(raised.value)
    with pytest.raises(ModelLoadError, match=r"of which 60\.0 GiB hold other models of this command.*score\.models"):
        load_when_free(time.monotonic, lambda: [gpu(20, own=60)], [UUID], 40 * GIB, "teacher")


def test_an_error_of_a_taken_gpu_while_loading_is_waited_for(
    node: Path, holder: "subprocess.Popen[bytes]", caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU seemed free, and the other program took more of its memory during the load."""
    attempts: list[str] = []

    def measure() -> list[GpuMemory]:
        return [gpu(60 if holder.poll() is None else 80)]

    def load() -> str:
        attempts.append("load")
        if len(attempts) == 1:
            raise RuntimeError(FULL)
        return "loaded"

    with caplog.at_level(logging.WARNING, "miniplm.workers"):
        assert load_when_free(load, measure, [UUID], 50 * GIB, "teacher") == "loaded"
    assert "CUDA out of memory" in caplog.text
    assert attempts == ["load", "load"]
    holder.kill()
    holder.wait()
    attempts.clear()
    with pytest.raises(ModelLoadError, match=r"CUDA out of memory.*dtype"):
        load_when_free(load, lambda: [gpu(79.5)], [UUID], 50 * GIB, "teacher")
    assert attempts == ["load"], "no other process holds the GPU, so a wait would not help"


def test_a_gpu_in_exclusive_mode_is_waited_for_and_refused(node: Path, holder: "subprocess.Popen[bytes]") -> None:
    def measure() -> list[GpuMemory]:
        if holder.poll() is None:
            raise RuntimeError(BUSY)
        return [gpu(80)]

    with pytest.raises(ScoringError, match=rf"busy or unavailable; it is held by process {holder.pid}"):
        load_when_free(time.monotonic, measure, [UUID], GIB, "teacher", 0.2)
    holder.kill()
    holder.wait()
    assert load_when_free(lambda: "loaded", measure, [UUID], GIB, "teacher", 0.2) == "loaded"


# --- with another scorer process of the same user ---

# Keeps a slot of a GPU for a model of 50 GiB, until it is killed, or idle until another process waits for the GPU.
SIBLING = """
import sys, tempfile, time
tempfile.tempdir, uuid, state = sys.argv[1:]
from miniplm_udf.workers.gpu_memory import GpuMemory, load_when_free
from miniplm_udf.workers.gpu_slots import keep_gpus, kept_slot_is_wanted
keep_gpus([uuid], [], 2, False)
GIB = 1024**3
measure = lambda: [GpuMemory(uuid, 80 * GIB, 80 * GIB, 0)]
load_when_free(lambda: print("loaded", flush=True), measure, [uuid], 50 * GIB, "teacher")
while state == "busy" or not kept_slot_is_wanted():
    time.sleep(0.05)
"""


@pytest.fixture
def sibling(
    node: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator["subprocess.Popen[bytes]"]:
    """A scorer process on the GPU, with a model of 50 GiB: busy, or idle. nvidia-smi lists no process."""
    state = getattr(request, "param", "busy")
    if state == "busy":
        monkeypatch.setattr(gpu_memory, "_IDLE_SECONDS", 0.1)
    list_holders(node, monkeypatch)
    process = subprocess.Popen([sys.executable, "-c", SIBLING, str(node), UUID, state], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"loaded\n"
    yield process
    process.kill()
    process.communicate()


def test_the_memory_of_other_scorer_processes_is_known_until_they_end(sibling: "subprocess.Popen[bytes]") -> None:
    assert other_users(UUID) == {sibling.pid: 50 * GIB}
    assert other_users("another") == {}
    sibling.kill()
    sibling.wait()
    assert other_users(UUID) == {}


def test_a_process_that_could_not_load_its_model_or_gave_the_gpu_back_needs_no_memory(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise ModelLoadError("3 missing tensors")

    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    gpu_slots.keep_gpus([UUID], [], 1, False)
    note = next(node.glob(f"*/{UUID}-0"))
    assert load_when_free(note.read_text, lambda: [gpu(80)], [UUID], GIB, "m") == f"{os.getpid()} {GIB}"
    assert load_when_free(note.read_text, lambda: [gpu(79, own=1)], [UUID], GIB, "m") == f"{os.getpid()} {2 * GIB}"
    with pytest.raises(ModelLoadError, match="3 missing tensors"):
        load_when_free(fail, lambda: [gpu(79, own=1)], [UUID], 9 * GIB, "m")
    assert note.read_text() == f"{os.getpid()} {GIB}"
    gpu_slots.give_back([UUID])
    assert note.read_text() == ""


def test_a_busy_scorer_process_on_the_same_gpu_is_not_waited_for(
    node: Path, monkeypatch: pytest.MonkeyPatch, sibling: "subprocess.Popen[bytes]"
) -> None:
    def load(free: float, gib: float) -> str:
        return load_when_free(lambda: "loaded", lambda: [gpu(free, siblings=50)], [UUID], int(gib * GIB), "m", 0.5)

    shared = rf"models\.m: GPU {UUID}: .* by scorer process {sibling.pid} .*lower score\.workers_per_gpu"
    with pytest.raises(ModelLoadError, match=shared):
        load(29, 40)
    # Its model leaves room for this one; its batches do not.
    with pytest.raises(ModelLoadError, match=shared):
        load(10, 20)
    list_holders(node, monkeypatch, line(sibling.pid))
    with pytest.raises(ModelLoadError, match=shared):
        load(10, 20)
    # Another program may hold what is missing, unless the two models need more than the GPU has.
    list_holders(node, monkeypatch, line(sibling.pid), line(2**30, "trainer"))
    with pytest.raises(ScoringError, match=rf"process {2**30} \(trainer"):
        load(10, 20)
    with pytest.raises(ModelLoadError, match=shared):
        load(10, 40)


def test_a_gpu_in_exclusive_mode_is_not_waited_for_if_a_scorer_process_has_it(
    sibling: "subprocess.Popen[bytes]",
) -> None:
    def measure() -> list[GpuMemory]:
        raise RuntimeError(BUSY)

    with pytest.raises(ModelLoadError, match=rf"busy or unavailable; .* scorer process {sibling.pid}"):
        load_when_free(time.monotonic, measure, [UUID], GIB, "m", 10.0)


@pytest.mark.parametrize("sibling", ["idle"], indirect=True)
def test_an_idle_scorer_process_ends_and_its_gpu_is_used(sibling: "subprocess.Popen[bytes]") -> None:
    def measure() -> list[GpuMemory]:
        users = other_users(UUID)
        return [gpu(30 if users else 80, siblings=sum(users.values()) / GIB)]

    assert load_when_free(sibling.wait, measure, [UUID], 50 * GIB, "m", 10.0) == 0


# --- the choice of a GPU ---


def test_a_process_takes_a_gpu_with_room(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(settings: ScoreConfig, gib: int) -> list[str]:
        names = model_scorers._take_gpus([UUID, "free", "another"], settings, False, gib * GIB)[1]
        gpu_slots.give_back(names)
        return names

    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    list_holders(node, monkeypatch)  # 10 GiB of the first GPU are free, 79 of the second
    assert by_room([UUID, "free"], 9 * GIB) == (["free", UUID], [])
    assert by_room([UUID, "free"], 10 * GIB) == (["free"], [UUID])
    assert by_room([UUID, "free"], 90 * GIB) == ([], ["free", UUID])
    assert by_room([UUID, "unknown"], 10 * GIB) == (["unknown"], [UUID])
    settings = ScoreConfig(workers=3)
    assert taken(settings, 5) == ["another"], "its free memory is unknown"
    with contextlib.closing(take_slot(["another"], 1, 0.0)[1]):
        assert taken(settings, 50) == ["free"]
        with contextlib.closing(take_slot(["free"], 1, 0.0)[1]):
            assert taken(settings, 50) == [UUID], "the last one, whose memory others hold"
            assert taken(ScoreConfig(workers=3, workers_per_gpu=None), 50) == ["another"]
    write_smi(node, monkeypatch, "exit 9")
    assert by_room([UUID, "free"], 90 * GIB) == ([UUID, "free"], [])
    assert taken(settings, 50) == [UUID]


def test_a_process_without_a_model_gives_back_a_gpu_that_stays_held(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HeldModel:
        """Has modules, as a model of torch."""

        def modules(self) -> "list[HeldModel]":
            return [self]

    def fail() -> list[int]:
        gpu_slots.keep_gpus("ab", [], 1, False)
        with pytest.raises(ScoringError, match="5 of 80 GiB"), model_scorers._given_back_on_error("a"):
            raise ScoringError("5 of 80 GiB are free")
        return gpu_slots.kept_gpus("ab")

    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    assert fail() == []
    model = HeldModel()
    model_scorers._ON_GPUS.update(model.modules())
    assert fail() == [0], "the other models of the process are on this GPU"
    del model
    assert fail() == []


def test_other_errors_are_raised_as_they_are(node: Path) -> None:
    def load() -> str:
        raise ModelLoadError("3 missing tensors")

    with pytest.raises(ModelLoadError, match="3 missing tensors"):
        load_when_free(load, lambda: [gpu(80)], [UUID], GIB, "teacher")
