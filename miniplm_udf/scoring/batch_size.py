"""Finds the token budget of a model's forward passes: the largest that fits in memory and is not slower.

    tokens of a pass:  n, 2n, 4n, ...   until a pass does not fit, the rate no longer rises, or the time is used up
    result:            the largest that fits and whose rate is at least 0.98 of the best

Input: a function that runs one pass over windows of the longest length, which need more memory and time than any other
batch of as many tokens. Owns the rules and the timing. The same search on the same GPU may end at a neighbouring size,
which changes no score. Executor side; on a CPU only in tests, because a pass takes seconds there.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from miniplm_udf.scoring.memory import free_memory, is_out_of_memory

LOGGER = logging.getLogger("miniplm.scorer")

# The first size. A GPU needs some tens of milliseconds for it, and it is smaller than any good size.
_FIRST_TOKENS = 4096
_SECONDS = 5.0
# Each size is timed by the shorter of two passes: disturbances only lengthen a pass, and the first one gets the memory.
_PASSES = 2
# The search ends when twice the tokens give a rate that is at most 3 % higher. A pass takes a + b * tokens seconds, so
# each doubling gains half as much as the one before: all larger sizes together would gain at most 3 % more.
_MIN_GAIN = 0.03
# Rates that differ by less are equal. Two measurements of one size differ by about as much.
_EQUAL_RATES = 0.02
# The share of the GPU that stays free at the peak of a pass; of the process's part, if several processes share the GPU.
_KEPT_FREE = 0.1


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        tokens: tokens of one pass.
        is_general: whether the size depends on the kind of GPU and the model alone. False if the search ended because
            of memory that other programs or models may have held.
    """

    tokens: int
    is_general: bool


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A batch size that was tried.

    Attributes:
        tokens: tokens of the pass.
        seconds: time of the pass; infinite if it ran out of memory.
        fits: whether its peak of memory was within the limit.
    """

    tokens: int
    seconds: float
    fits: bool

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


def largest_not_slower(measurements: Sequence[Measurement]) -> int:
    """Chooses a size: the largest that fits and whose rate is equal to the best rate, up to noise.

    Args:
        measurements: at least one.

    Returns:
        Its tokens; the smallest size if none fits, because no pass can be shorter than one window.
    """
    fitting = [one for one in measurements if one.fits]
    if not fitting:
        return min(one.tokens for one in measurements)
    best = max(one.rate for one in fitting)
    return max(one.tokens for one in fitting if one.rate >= (1 - _EQUAL_RATES) * best)


def still_rises(measurements: Sequence[Measurement]) -> bool:
    """Whether the last size is faster than all earlier sizes by so much that a larger one is worth a try.

    Args:
        measurements: in ascending order of sizes; at least one.
    """
    *earlier, last = measurements
    return last.fits and all(last.rate > (1 + _MIN_GAIN) * one.rate for one in earlier)


def find_tokens_per_batch(
    name: str, run_pass: Callable[[int], object], window_tokens: int, device: torch.device, workers_per_gpu: int = 1,
    seconds: float = _SECONDS,
) -> SearchResult:  # fmt: skip
    """Searches the token budget of a model that is loaded.

    On a GPU a size fits if the most memory that is allocated during its pass leaves a tenth of the process's part of
    the GPU free, and if the pass itself takes at most half of what was free before: so a second model of this process,
    and the cache of torch's allocator, have room.

    Args:
        name: the model's name, for the log.
        run_pass: runs a pass over this many windows, and waits for its result.
        window_tokens: tokens of each window.
        device: where the passes run.
        workers_per_gpu: processes that share the GPU.
        seconds: longest duration of the search, without its first pass; no pass is begun that would exceed it.

    Returns:
        The tokens of one pass, and whether they are of use to other processes.
    """
    n_windows = math.ceil(_FIRST_TOKENS / window_tokens)
    _passes(run_pass, n_windows, device, 1)  # loads kernels, which take memory too
    limit = _MemoryLimit(device, workers_per_gpu)
    end = time.perf_counter() + seconds
    measured: list[Measurement] = []
    while True:
        size = _measure(run_pass, n_windows, window_tokens, device, limit)
        if size.fits and not still_rises([*measured, size]) and _takes(size) < end - time.perf_counter():
            # Measured again: a disturbance shall not end the search.
            again = _measure(run_pass, n_windows, window_tokens, device, limit)
            size = min(size, again, key=lambda one: one.seconds)
        measured.append(size)
        has_time = 2 * _takes(size) < end - time.perf_counter()
        needs_room = not size.fits or (still_rises(measured) and not limit.has_room_for_twice())
        if needs_room or not (still_rises(measured) and has_time):
            break
        n_windows *= 2
    limit.begin()
    tokens = largest_not_slower(measured)
    rates = ", ".join(f"{one.tokens:,}: {one.rate:,.0f}" if one.fits else f"{one.tokens:,}: no" for one in measured)
    took = time.perf_counter() - end + seconds
    LOGGER.info("%s: batches of %s tokens, found in %.1f s; tokens/s by size: %s", name, f"{tokens:,}", took, rates)
    # Where a pass ran out of memory, the limit was wrong: something else took the memory meanwhile.
    is_general = not needs_room or (limit.is_own_part and math.isfinite(size.seconds))
    return SearchResult(tokens, is_general)


class _MemoryLimit:
    """How much memory a pass may take; without a limit on a device other than a GPU.

    Attributes:
        is_own_part: whether the limit is the process's part of the GPU, so that it does not depend on free memory.
    """

    def __init__(self, device: torch.device, workers_per_gpu: int) -> None:
        self._device = device
        self._before = self._bytes = 0
        self.is_own_part = True
        if self._is_gpu():
            self.begin()
            free, total = torch.cuda.mem_get_info(device)
            self._before = torch.cuda.memory_allocated(device)
            own_part, available = int((1 - _KEPT_FREE) * total / workers_per_gpu), self._before + free // 2
            self._bytes, self.is_own_part = min(own_part, available), own_part <= available

    def begin(self) -> None:
        """Called before the passes of a size, and after the search: the log shall show the peak of scoring."""
        if self._is_gpu():
            # Blocks of an earlier size are of no use to this one.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def is_kept(self) -> bool:
        """Whether the passes since `begin` stayed within the limit."""
        return not self._is_gpu() or torch.cuda.max_memory_allocated(self._device) <= self._bytes

    def has_room_for_twice(self) -> bool:
        """Whether a pass of twice the size would stay within the limit: its activations grow with its tokens."""
        peak = torch.cuda.max_memory_allocated(self._device) if self._is_gpu() else 0
        return not self._is_gpu() or 2 * peak - self._before <= self._bytes

    def _is_gpu(self) -> bool:
        return self._device.type == "cuda"


def _takes(size: Measurement) -> float:
    """Seconds of all passes of a size."""
    return _PASSES * size.seconds


def _measure(
    run_pass: Callable[[int], object], n_windows: int, window_tokens: int, device: torch.device, limit: _MemoryLimit
) -> Measurement:
    limit.begin()
    seconds = _passes(run_pass, n_windows, device, _PASSES)
    return Measurement(n_windows * window_tokens, seconds, math.isfinite(seconds) and limit.is_kept())


def _passes(run_pass: Callable[[int], object], n_windows: int, device: torch.device, n_passes: int) -> float:
    """Seconds of the shortest of some passes; infinite if one runs out of memory."""
    shortest = math.inf
    try:
        for _ in range(n_passes):
            start = time.perf_counter()
            run_pass(n_windows)
            shortest = min(shortest, time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shortest = math.inf
    if math.isinf(shortest):
        # Outside the except block: the traceback would keep the tensors of the failed pass.
        free_memory(device)
    return shortest


def place_of(device: torch.device, dtype: str, workers_per_gpu: int = 1, attention: str = "auto") -> str:
    """Names the kind of device that a size was found on, and how the model runs there; a size holds for the name.

    Args:
        device: where the model is.
        dtype: dtype of the forward pass.
        workers_per_gpu: processes that share the GPU.
        attention: `score.attention`.

    Returns:
        `NVIDIA H200/bfloat16`, `NVIDIA H200/bfloat16/2 workers`, `NVIDIA H200/bfloat16/eager` or `cpu/float32`.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shared = "" if device.type != "cuda" or workers_per_gpu == 1 else f"/{workers_per_gpu} workers"
    return f"{name}/{dtype}{shared}{'' if attention == 'auto' else f'/{attention}'}"
