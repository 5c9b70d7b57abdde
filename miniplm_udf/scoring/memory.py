"""Memory: whether an error means that it is full, how much is in use, and how to free it. Executor side."""

import gc
import os
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is full: CUDA has a class for it, the CPU allocator only a message.

    Args:
        error: an error that torch or Python raised.
    """
    message = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in message
        or "can't allocate memory" in message
        or "alloc_failed" in message  # cuBLAS, cuDNN
        or "bad_alloc" in message
    )


def free_memory(device: torch.device) -> None:
    """Gives back the memory of a pass that did not fit. Call it outside the except block, which keeps the tensors.

    Args:
        device: where the pass ran.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_in_use(device: torch.device) -> tuple[int, int] | tuple[int, None] | None:
    """The memory that this process has used on a device, for the log.

    Args:
        device: where the model is.

    Returns:
        On a GPU the most bytes that were allocated at a time, and the bytes that the GPU has. On a CPU the bytes of the
        process that are in memory now, and None; None alone where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), None
    except OSError:
        return None
