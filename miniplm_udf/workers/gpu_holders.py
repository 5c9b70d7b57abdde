"""Which processes hold the memory of GPUs, and how much is free, as `nvidia-smi` says it.

Input: UUIDs of GPUs. Output: processes, a sentence about them for a message, and bytes. Uses no memory of a GPU and
loads no torch. Owns which part of another process's command is shown: its program and script, never its arguments,
which may hold a password. Executor side; a retried task asks again.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

_PROCESSES = "--query-compute-apps=gpu_uuid,pid,used_memory,name"
_MEMORY = "--query-gpu=uuid,memory.free"
_QUERY_SECONDS = 20.0
_MIB = 1024**2
# Python's options without a value, then an option with a value, which may be in the same word.
_PYTHON_OPTION = re.compile(r"-[bBdEiIOPqsSuvx]*([cmWX])(.*)", re.DOTALL)
_OWN_MODULE = "miniplm_udf.workers.scorer_process"


@dataclasses.dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU, as nvidia-smi lists it.

    Attributes:
        gpu: UUID of the GPU, without the prefix `GPU-`.
        pid: process id.
        used: memory in nvidia-smi's words, such as `1024 MiB`.
        name: its program.
    """

    gpu: str
    pid: int
    used: str
    name: str


def parse_processes(text: str) -> list[GpuProcess]:
    """Returns the processes that `nvidia-smi` lists, from the output of its query for processes.

    Args:
        text: the output; a line of another form, such as an error, is left out.
    """
    processes = []
    for line in text.splitlines():
        gpu, pid, used, name = ([part.strip() for part in line.split(",", 3)] + [""] * 4)[:4]
        if pid.isdigit():
            processes.append(GpuProcess(gpu.removeprefix("GPU-"), int(pid), used, name))
    return processes


def free_memory() -> dict[str, int]:
    """The free bytes of each GPU that nvidia-smi knows, by UUID; empty where nvidia-smi is missing or fails."""
    free = {}
    for line in (_smi(_MEMORY) or "").splitlines():
        name, _, number = (part.strip() for part in line.partition(","))
        if match := re.fullmatch(r"(\d+) MiB", number):
            free[name.removeprefix("GPU-")] = int(match.group(1)) * _MIB
    return free


def gpu_processes(names: Sequence[str]) -> list[GpuProcess] | None:
    """The other processes on GPUs; None where nvidia-smi is missing or fails.

    Args:
        names: UUIDs of the GPUs. Where nvidia-smi knows none of them (parts of a GPU), the processes of all GPUs are
            listed.
    """
    output = _smi(_PROCESSES)
    if output is None:
        return None
    others = [process for process in parse_processes(output) if process.pid != os.getpid()]
    processes = [process for process in others if process.gpu in names]
    if not processes and others and not free_memory().keys() & set(names):
        return others
    return processes


def holders(names: Sequence[str]) -> str:
    """Returns in words who else holds GPUs: each process with its memory, and its user and program if they can be read.

    Args:
        names: UUIDs of the GPUs.
    """
    processes = gpu_processes(names)
    if processes is None:
        return "nvidia-smi cannot be run here, so the processes that hold it are unknown"
    if not processes:
        return "nvidia-smi lists no other process (it does not see processes of other containers)"
    return "it is held by " + ", ".join(_in_words(process) for process in processes)


def program_of(command: Sequence[str]) -> str:
    """Returns the program of a command, and for Python its module or script; no other argument.

    Args:
        command: the words of the command.
    """
    program, words = command[0], iter(command[1:])
    if not Path(program).name.startswith("python"):
        return program
    for word in words:
        if match := _PYTHON_OPTION.fullmatch(word):
            option, value = match.groups()
            if option == "c":
                return f"{program} -c"
            value = value or next(words, "")
            if option == "m":
                return f"{program} -m {value}"
        elif not word.startswith("-"):
            return f"{program} {word}"
    return program


def _smi(query: str) -> str | None:
    """The output of nvidia-smi; None where it is missing or fails."""
    command = ("nvidia-smi", query, "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _in_words(process: GpuProcess) -> str:
    known = f"process {process.pid} ({process.name}"
    with contextlib.suppress(ImportError):
        # Imported here, so that tests/gpu runs where torch and transformers alone are installed.
        import psutil

        with contextlib.suppress(psutil.Error):
            listed = psutil.Process(process.pid)
            command = listed.cmdline()
            # In a container another process may have this number.
            if command and Path(command[0]).name == Path(process.name).name:
                program = program_of(command)
                kind = "scorer process" if program.endswith(f" -m {_OWN_MODULE}") else "process"
                known = f"{kind} {process.pid} of {listed.username()} ({program}"
    return f"{known}, {process.used})"
