"""A dispatch mode that fails when a tensor's value is read, which would make the CPU wait for a GPU."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Reads of one value, and operations whose result has a size that the CPU has to know.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class NoWait(TorchDispatchMode):
    """Fails when a value is read from a tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in _WAITING):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))
