"""A dispatch mode that fails when a tensor's value is read, which would make the CPU wait for a GPU."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoWait(TorchDispatchMode):
    """Fails when a value is read from a tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(function) or "is_nonzero" in str(function):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))
