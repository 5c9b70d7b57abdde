"""A model on a CPU, made quicker in two ways that change no score: packed weights and kept memory.

Input: a loaded model on the CPU. Output: the same model, its `nn.Linear` layers replaced by `PackedLinear` (weights as
oneDNN's matrix product wants them), in a process whose allocator keeps what is freed. Where torch has no oneDNN, or the
C library is another, that part is left out. What each gains: docs/scoring.md. Executor side; pure but for the
allocator.
"""

import contextlib
import ctypes
from typing import Any

import torch

# mallopt's parameters, malloc.h. The threshold for mmap is the largest that glibc takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MMAP_BYTES = 1 << 30, 1 << 25


def prepare(model: Any) -> None:
    """Does both to a model in place."""
    keep_freed_memory()
    pack_linears(model)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: giving back the buffers of a layer and faulting them in again costs a tenth."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class PackedLinear(torch.nn.Module):
    """x W^T + b with W packed once. Inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Packs a copy of `weight`, shape (out, in); `can_pack` says of which weights that can be had."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # A plain attribute: packed tensors are opaque to state_dict() and to().
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked at each look: for the rare layer that reads another's weight."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight can be packed here."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: Any) -> None:
    """Packs the linear layers of a model in place, except its output layer, which `head.Head` cuts into tiles."""
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses do something of their own; the shared output layer stays what the embedding knows.
            if type(layer) is torch.nn.Linear and layer is not output and can_pack(layer.weight):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))
