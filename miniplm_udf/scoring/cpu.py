"""Makes a model on a CPU faster in two ways that change no score: packed weights and kept memory.

Input: a loaded model on the CPU. Output: the same model, its `nn.Linear` layers replaced by `PackedLinear` (weights in
the layout of oneDNN's matrix product), in a process whose allocator keeps freed memory. Where torch has no oneDNN, or
the C library is not glibc, that part is left out. The gains are in docs/scoring.md. Executor side; pure, except for the
allocator.
"""

import contextlib
import ctypes
from typing import Any

import torch

# Parameters of mallopt, from malloc.h. The threshold for mmap is the largest that glibc accepts.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MMAP_BYTES = 1 << 30, 1 << 25


def prepare(model: Any) -> None:
    """Makes a model on the CPU faster, in place: keeps freed memory and packs the weights of its linear layers.

    Args:
        model: a loaded model of transformers.
    """
    keep_freed_memory()
    pack_linears(model)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: returning the buffers of each layer to the kernel costs a tenth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class PackedLinear(torch.nn.Module):
    """A linear layer, x W^T + b, with W packed once. For inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Packs a copy of the weight.

        Args:
            weight: shape (out, in); `can_pack` must be true for it.
            bias: shape (out,), or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # A plain attribute, because state_dict() and to() cannot handle packed tensors.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked at each access; a few architectures read the weight of another layer."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: shape (..., in).

        Returns:
            x @ weight.T + bias, shape (..., out).
        """
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine's oneDNN can pack a weight.

    Args:
        weight: shape (out, in), float32, or bfloat16 where the CPU computes in it; others cannot be packed.
    """
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
    """Packs the linear layers of a model in place, except its output layer, which `head.Head` cuts into tiles.

    Args:
        model: a causal LM of transformers on the CPU.
    """
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses may compute something else; the output layer shares its weight with the embedding.
            if type(layer) is torch.nn.Linear and layer is not output and can_pack(layer.weight):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))


def unpack_linears(model: torch.nn.Module) -> None:
    """Takes back `pack_linears`, in place: torch compiles no code for packed weights.

    Args:
        model: a module with packed layers.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                plain.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
                if layer.bias is not None:
                    plain.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
                setattr(parent, name, plain)
