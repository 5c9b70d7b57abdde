"""Which GPU of this machine a process uses: the GPU that Spark assigned to it, or a GPU with a free slot.

Each GPU has `score.workers_per_gpu` slots. A process that holds a model on a GPU keeps a slot of that GPU until it
ends, and uses the same GPU for all its models. It gives the slot back if it cannot load a model and holds no other. A
process whose models are split over several GPUs takes a slot of each.
Input: names of the visible GPUs in the order of their device numbers, and the addresses that Spark assigned. Output:
device numbers. Knows no models and no torch: a GPU is a name here, the same in all processes of the machine. Executor
side; a retried task finds the slots that its process keeps.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from miniplm_udf.errors import ScoringError
from miniplm_udf.workers.slot_files import locked, node_folder

LOGGER = logging.getLogger("miniplm.workers")

# Longest wait for a GPU: for its slot and for its memory together.
PATIENCE_SECONDS = 600.0
_LOG_EVERY_SECONDS = 60.0
_CHECK_EVERY_SECONDS = 1.0
# Slots that this process keeps until it ends, by the name of the GPU.
_KEPT: dict[str, IO[str]] = {}
# In a scorer process: the GPUs of the task that it was started for.
_ASSIGNED: list[str] = []


def assign_gpus(addresses: Sequence[str]) -> None:
    """Sets the GPUs of this scorer process.

    Args:
        addresses: addresses of the GPUs that Spark assigned to the task that started the process; empty for none.
    """
    _ASSIGNED[:] = addresses


def gpu_addresses() -> list[str]:
    """The addresses of the GPUs that Spark assigned to this task, or that `assign_gpus` named; empty for none."""
    if _ASSIGNED:
        return list(_ASSIGNED)
    try:
        from pyspark import TaskContext
    except ImportError:
        return []
    context = TaskContext.get()
    resources = context.resources() if context is not None else {}
    return sorted(str(address) for address in resources["gpu"].addresses) if "gpu" in resources else []


def device_numbers(names: Sequence[str], addresses: Sequence[str]) -> list[int]:
    """The device numbers of the GPUs that a process may use.

    Args:
        names: names of the visible GPUs, in the order of their device numbers; torch's are UUIDs.
        addresses: what Spark assigned: numbers or UUIDs (`GPU-...`); empty for nothing.

    Returns:
        Numbers below the length of `names`; all of them if Spark assigned nothing. Where the resource manager hides the
        other GPUs, the assigned GPUs are the first ones, whatever their addresses.
    """
    if not addresses:
        return list(range(len(names)))
    known = {name: number for number, name in enumerate(names)} | {str(number): number for number in range(len(names))}
    numbers = [known.get(address.removeprefix("GPU-")) for address in addresses]
    if None in numbers:
        return list(range(min(len(addresses), len(names))))
    return [number for number in numbers if number is not None]


def keep_gpus(
    names: Sequence[str],
    addresses: Sequence[str],
    slots: int | None,
    several: bool,
    patience_seconds: float = PATIENCE_SECONDS,
    rank: Callable[[Sequence[str]], tuple[list[str], list[str]]] = lambda names: (list(names), []),
) -> list[int]:
    """Takes slots of GPUs and keeps them until this process ends; returns the same GPUs at the next call.

    A process that takes several GPUs takes them in the order of their names, and gives back first what it keeps: so no
    two processes ever wait for each other. Until then it must hold no model on a GPU.

    Args:
        names: names of the visible GPUs, in the order of their device numbers.
        addresses: addresses of the GPUs that Spark assigned to this process; empty for none.
        slots: processes that may share a GPU; None for any number, so that no process waits.
        several: whether this process takes all of its GPUs; otherwise it takes one.
        patience_seconds: longest wait for the slots.
        rank: of several GPUs, those that are preferred and those that are taken only if the others have no free slot,
            each in the order of preference; called if the process takes one of several GPUs.

    Returns:
        Device numbers, ascending.

    Raises:
        ScoringError: other processes have kept all slots for `patience_seconds`.
    """
    own = [names[number] for number in sorted(device_numbers(names, addresses))]
    kept = [name for name in own if name in _KEPT]
    if not several:
        if not kept:
            first, last = rank(own) if len(own) > 1 else (own, [])
            name, _KEPT[name] = take_slot(first, slots, patience_seconds, last)
            kept = [name]
        give_back(kept[1:])
        return [names.index(kept[0])]
    if len(kept) < len(own):
        give_back(kept)
        deadline = time.monotonic() + patience_seconds
        try:
            for name in sorted(own):
                _KEPT[name] = take_slot([name], slots, max(0.0, deadline - time.monotonic()))[1]
        except ScoringError:
            give_back(own)
            raise
    return [names.index(name) for name in own]


def kept_gpus(names: Sequence[str]) -> list[int]:
    """The device numbers of the GPUs of which this process keeps a slot.

    Args:
        names: names of the visible GPUs, in the order of their device numbers.
    """
    return [number for number, name in enumerate(names) if name in _KEPT]


def give_back(names: Sequence[str]) -> None:
    """Frees the slots that this process keeps of GPUs, on which it must hold no model.

    Args:
        names: names of the GPUs; a GPU of which it keeps no slot is left out.
    """
    for name in names:
        if name in _KEPT:
            with _KEPT.pop(name) as file:
                # This process lives on, and its id in the file would name it as a user of the GPU.
                file.truncate(0)


def note_memory(n_bytes: Mapping[str, int]) -> None:
    """Tells the other processes how much memory this process needs for its models, on GPUs of which it keeps a slot.

    Args:
        n_bytes: bytes of the models that are loaded or about to be loaded, by name of the GPU.
    """
    for name in n_bytes.keys() & _KEPT.keys():
        _sign(_KEPT[name], n_bytes[name])


def other_users(name: str) -> dict[int, int]:
    """The other processes that keep a slot of a GPU, with the bytes that they noted for their models, by process id.

    Args:
        name: name of the GPU.
    """
    users = {}
    for path in node_folder().glob(f"{name}-*"):
        pid, n_bytes = _signature(path)
        # A process that has ended may have left its id here. Its slot is not locked for the check, which would make the
        # slot look taken, unless another process has the id now.
        if pid in (None, os.getpid()) or not _is_alive(pid):
            continue
        if (file := locked(path)) is None:
            users[pid] = n_bytes
        else:
            file.close()
    return users


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def take_slot(
    names: Sequence[str], slots: int | None, patience_seconds: float = PATIENCE_SECONDS, last: Sequence[str] = ()
) -> tuple[str, IO[str]]:
    """Waits for a free slot of one of several GPUs that processes of this machine share.

    Takes the GPU with the fewest processes, and among equals the first: so a second process shares a GPU only when all
    GPUs have one.

    Args:
        names: names of the GPUs, the same in all processes of this machine, in the order of preference.
        slots: processes that may share a GPU; None for any number.
        patience_seconds: longest wait.
        last: names of further GPUs, which are taken only if no slot of the others is free.

    Returns:
        The GPU's name, and the open file: whoever holds its lock has the slot.

    Raises:
        ScoringError: other processes have kept all slots for `patience_seconds`.
    """
    start = logged = time.monotonic()
    every = [*names, *last]
    with contextlib.ExitStack() as waiting:
        for name in itertools.cycle(every):
            if (taken := _free_slot(names, slots) or _free_slot(last, slots)) is not None:
                return taken
            assert slots is not None
            waited = time.monotonic() - start
            problem = f"all GPUs have been taken for {waited:.0f} s: {_holders(every, slots)}"
            hint = (
                "ask for a GPU a task (spark.task.resource.gpu.amount=1), let more processes share one "
                "(score.workers_per_gpu), or have fewer of them (score.workers)"
            )
            if waited >= patience_seconds:
                raise ScoringError(f"{problem}; {hint}")
            if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
                logged = time.monotonic()
                LOGGER.warning("%s; %s", problem, hint)
            # One GPU after the other, so that not all idle processes end when one of them would be enough.
            previous = waiting.pop_all()
            waiting.enter_context(wanted([name]))
            previous.close()
            time.sleep(min(_CHECK_EVERY_SECONDS, patience_seconds))
    raise AssertionError("expected at least one GPU")


def _free_slot(names: Sequence[str], slots: int | None) -> tuple[str, IO[str]] | None:
    """Takes a slot of the GPU with the fewest processes; None where no slot is free."""
    for number in itertools.count() if slots is None else range(slots):
        for name in names:
            if (file := locked(node_folder() / f"{name}-{number}")) is not None:
                _sign(file)
                return name, file
        if not names:
            break
    return None


def _sign(file: IO[str], n_bytes: int = 0) -> None:
    """Writes this process's id and the bytes of its models into the file of its slot, for other processes."""
    file.truncate(0)
    file.write(f"{os.getpid()} {n_bytes}")
    file.flush()


def _signature(path: Path) -> tuple[int | None, int]:
    """The process id and the bytes in the file of a slot; None and 0 where its process is about to write them."""
    words = path.read_text().split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (None, 0)


def _holders(names: Sequence[str], slots: int) -> str:
    """Who has which GPU, in words."""
    folder, parts = node_folder(), []
    for name in names:
        pids = [_signature(folder / f"{name}-{number}")[0] for number in range(slots)]
        parts.append(f"{name} by process {' and '.join(str(pid or '?') for pid in pids)}")
    return ", ".join(parts)


@contextlib.contextmanager
def wanted(names: Sequence[str]) -> Iterator[None]:
    """Tells idle scorer processes that another process waits for their GPU: they end. Holds in the block.

    Args:
        names: names of the GPUs.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            file = stack.enter_context((node_folder() / f"{name}.wanted").open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def kept_slot_is_wanted() -> bool:
    """Whether another process waits for a slot that this process keeps; may be False while others ask the same."""
    folder = node_folder()
    for name in list(_KEPT):
        # One process asks at a time, since its own lock looks like the lock of a process that waits.
        if (asking := locked(folder / f"{name}.asking")) is None:
            continue
        with asking:
            if (file := locked(folder / f"{name}.wanted")) is None:
                return True
            file.close()
    return False
