"""Waits until GPUs have room for a model, and refuses a model that cannot fit.

Other programs may have the GPU of a scorer process: another user's training holds its memory, or the GPU is in
exclusive mode. Input: the free memory of the GPUs before a model is loaded, the bytes of its weights, and errors of
CUDA while it is loaded. Output: the loaded model, or an error that says who has the GPU and what to do. An error here
ends the task, not the process. Loads torch inside the functions. Executor side; a retried task waits again.
"""

import contextlib
import dataclasses
import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from miniplm_udf.errors import ModelLoadError, ScoringError, first_line
from miniplm_udf.scoring.device_maps import MARGIN_BYTES, SplitError
from miniplm_udf.workers.gpu_holders import free_memory, gpu_processes, holders
from miniplm_udf.workers.gpu_slots import PATIENCE_SECONDS, note_memory, other_users, wanted

LOGGER = logging.getLogger("miniplm.workers")

_LOG_EVERY_SECONDS = 60.0
_CHECK_EVERY_SECONDS = 1.0
# After an error of CUDA: each attempt may read the model's files again.
_RETRY_SECONDS = 15.0
# Idle scorer processes end within this time when another process waits for their GPU.
_IDLE_SECONDS = 10.0
_GIB = 1024**3

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """The memory of a GPU.

    Attributes:
        name: UUID of the GPU.
        free: bytes that are free now.
        total: bytes of the GPU.
        own: bytes that the models of this process hold already.
        siblings: bytes that the models of other scorer processes of this user hold or are about to hold. Such a
            process ends when it is idle and another one waits for the GPU.
    """

    name: str
    free: int
    total: int
    own: int
    siblings: int = 0


def measured(devices: Sequence[str], names: Sequence[str]) -> list[GpuMemory]:
    """Returns the memory of GPUs now; gives back first what this process does not use.

    The first of them becomes torch's current device.

    Args:
        devices: torch devices.
        names: their UUIDs.

    Raises:
        RuntimeError: another process has a GPU in exclusive mode, or its memory is too full for a context.
    """
    import torch

    gc.collect()
    # Calls of torch that name no device would take memory of the first GPU, which may belong to another process.
    torch.cuda.set_device(devices[0])
    torch.cuda.empty_cache()
    memory = []
    for device, name in zip(devices, names, strict=True):
        free, total = torch.cuda.mem_get_info(device)
        own, siblings = torch.cuda.memory_reserved(device), sum(other_users(name).values())
        memory.append(GpuMemory(name, free, total, own, siblings))
    return memory


def room(gpus: Sequence[GpuMemory], n_bytes: int) -> Literal["now", "later", "never"]:
    """When the weights of a model fit on GPUs, with MARGIN_BYTES for its passes on each GPU.

    Args:
        gpus: the GPUs that the model is split over; mostly one.
        n_bytes: bytes of the weights.

    Returns:
        now; later, if other processes hold what is missing or need it for a model that they load; never, if the GPUs
        are too small for the weights and the models that this process holds already.
    """
    if _without_margins(min(gpu.free, _beside_siblings(gpu)) for gpu in gpus) >= n_bytes:
        return "now"
    return "later" if _without_margins(gpu.total - gpu.own for gpu in gpus) >= n_bytes else "never"


def _beside_siblings(gpu: GpuMemory) -> int:
    """Bytes of a GPU that remain for this process if only its own models and those of its siblings are on the GPU."""
    return gpu.total - gpu.own - gpu.siblings


def _without_margins(n_bytes: Iterable[int]) -> int:
    """Bytes for weights on several GPUs, of which each keeps a margin."""
    return sum(max(0, number - MARGIN_BYTES) for number in n_bytes)


def by_room(names: Sequence[str], n_bytes: int) -> tuple[list[str], list[str]]:
    """Divides GPUs into those that have room for a model now and the others, each with the most free memory first.

    Takes no memory of the GPUs. Where their free memory is unknown, they count as free, in the order of `names`.

    Args:
        names: UUIDs of the GPUs.
        n_bytes: bytes of the model's weights.

    Returns:
        The GPUs with room, and the others.
    """
    free = free_memory()
    ordered = sorted(names, key=lambda name: free.get(name, math.inf), reverse=True)
    has_room = {name for name in names if free.get(name, math.inf) - MARGIN_BYTES >= n_bytes}
    return [name for name in ordered if name in has_room], [name for name in ordered if name not in has_room]


def held_by_others(gpus: Sequence[GpuMemory]) -> bool:
    """Whether other processes hold memory of GPUs, more than the context of this process explains, or will hold it.

    Args:
        gpus: the GPUs.
    """
    return any(gpu.siblings > 0 or gpu.total - gpu.free - gpu.own > MARGIN_BYTES for gpu in gpus)


def is_taken(error: BaseException) -> bool:
    """Whether an error means that a GPU has no memory, or that another process has it in exclusive mode.

    Args:
        error: an error that torch raised, or the ModelLoadError that quotes it.
    """
    message = str(error) if isinstance(error, RuntimeError | ModelLoadError) else ""
    return "CUDA" in message and ("out of memory" in message or "busy or unavailable" in message)


# Loading


def load_when_free(
    load: Callable[[], T],
    measure: Callable[[], list[GpuMemory]],
    names: Sequence[str],
    n_bytes: int,
    alias: str,
    patience_seconds: float = PATIENCE_SECONDS,
) -> T:
    """Loads a model as soon as GPUs have room for it. Logs every minute who holds them.

    Args:
        load: loads the model.
        measure: the memory of the GPUs; raises as `measured` does.
        names: UUIDs of the GPUs.
        n_bytes: bytes of the model's weights.
        alias: the model's alias, for messages.
        patience_seconds: longest wait.

    Returns:
        The result of `load`.

    Raises:
        ModelLoadError: the GPUs are too small for the model, or for the model and those of other scorer processes of
            this user, which are at work.
        ScoringError: other processes have held the GPUs for `patience_seconds`.
    """
    start, logged = time.monotonic(), None
    asked = start
    with contextlib.ExitStack() as waiting:
        while True:
            result = _attempt(load, measure, n_bytes)
            if not isinstance(result, _Obstacle):
                return result
            if not result.may_end:
                raise ModelLoadError(_too_large(alias, result.gpus, n_bytes, result.problem))
            problem = f"models.{alias}: GPU {', '.join(names)}: {result.problem}"
            now = time.monotonic()
            if now - asked >= _IDLE_SECONDS:
                asked = now
                if pids := _busy_siblings(result.gpus, names, n_bytes):
                    raise ModelLoadError(f"{problem}; {_shared(pids)}")
            if now - start >= patience_seconds:
                raise ScoringError(
                    f"{problem}; {holders(names)}; waited {now - start:.0f} s: end these processes, let this one use "
                    f"other GPUs (CUDA_VISIBLE_DEVICES), or run the same command later"
                )
            if logged is None:
                waiting.enter_context(wanted(names))
            if logged is None or now - logged >= _LOG_EVERY_SECONDS:
                logged = now
                LOGGER.warning("waiting: %s; %s", problem, holders(names))
            time.sleep(min(result.pause_seconds, patience_seconds))


@dataclasses.dataclass(frozen=True)
class _Obstacle:
    """Why a model could not be loaded.

    Attributes:
        problem: the reason, in words.
        gpus: the memory of the GPUs before the attempt; empty where it cannot be measured.
        may_end: whether a wait may help, because others hold memory.
        pause_seconds: time until the next attempt.
    """

    problem: str
    gpus: list[GpuMemory]
    may_end: bool
    pause_seconds: float


def _attempt(load: Callable[[], T], measure: Callable[[], list[GpuMemory]], n_bytes: int) -> T | _Obstacle:
    """Loads a model if GPUs have room for it now."""
    gpus: list[GpuMemory] = []
    try:
        gpus = measure()
        fits = room(gpus, n_bytes)
        if fits != "now":
            problem = f"{_free(gpus)} are free, expected {_needed(n_bytes)}"
            return _Obstacle(problem, gpus, fits == "later" and held_by_others(gpus), _CHECK_EVERY_SECONDS)
        note_memory({gpu.name: gpu.own + n_bytes // len(gpus) for gpu in gpus})
        return load()
    except Exception as error:
        note_memory({gpu.name: gpu.own for gpu in gpus})
        # Whole layers are placed on a GPU, so a split model may need more than the sum of its weights.
        if not (is_taken(error) or isinstance(error, SplitError)):
            raise
        problem = first_line(error)
    # Outside the except block, whose traceback would keep the tensors of the failed attempt.
    return _Obstacle(problem, gpus, not gpus or _others_hold(measure), _RETRY_SECONDS)


def _others_hold(measure: Callable[[], list[GpuMemory]]) -> bool:
    """Whether others hold memory now; after a failed attempt they may hold more than before it."""
    try:
        return held_by_others(measure())
    except RuntimeError as error:
        if not is_taken(error):
            raise
        return True


def _busy_siblings(gpus: Sequence[GpuMemory], names: Sequence[str], n_bytes: int) -> list[int]:
    """Ids of other scorer processes of this user that hold what is missing; none if other programs may hold it."""
    pids = sorted({pid for name in names for pid in other_users(name)})
    if not pids or (gpus and _without_margins(_beside_siblings(gpu) for gpu in gpus) < n_bytes):
        return pids
    is_other = any(process.pid not in pids for process in gpu_processes(names) or ())
    return [] if is_other else pids


def _free(gpus: Sequence[GpuMemory]) -> str:
    return " + ".join(f"{gpu.free / _GIB:.1f}" for gpu in gpus) + " GiB"


def _shared(pids: Sequence[int]) -> str:
    """Who holds the GPU and what to do, where no wait would help because busy scorer processes share it."""
    return (
        f"the rest is held by scorer process {', '.join(map(str, pids))} of the same user, which is at work; lower "
        f"score.workers_per_gpu, or run fewer tasks at the same time (score.workers; for `nll_udf` fewer cores, or one "
        f"call in a query)"
    )


def _needed(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.1f} GiB for the weights and {MARGIN_BYTES / _GIB:.0f} GiB on each GPU for a pass"


def _too_large(alias: str, gpus: Sequence[GpuMemory], n_bytes: int, problem: str) -> str:
    """The message for a model that no wait would help."""
    totals = " + ".join(f"{gpu.total / _GIB:.1f}" for gpu in gpus)
    own = sum(gpu.own for gpu in gpus)
    others = f", of which {own / _GIB:.1f} GiB hold other models of this command" if own else ""
    remedies = [f"a smaller dtype (models.{alias}.dtype)"]
    remedies += ["fewer models in one command (score.models)"] if own else []
    if len(gpus) == 1:
        remedies.append(f"all GPUs of the node for one process (models.{alias}.device_map: auto)")
    remedies.append(f"a server that holds the model (models.{alias}.backend: openai)")
    return (
        f"models.{alias}: expected {_needed(n_bytes)}, found GPUs of {totals} GiB{others} ({problem}); use "
        f"{', or '.join(remedies)}"
    )
