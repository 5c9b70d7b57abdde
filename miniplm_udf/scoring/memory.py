"""Tells whether an error means that memory is full. Executor side; pure."""

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
