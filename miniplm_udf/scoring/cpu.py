"""A model on a CPU, made quicker in three ways that change no score: packed weights, blocked attention, kept memory.

Input: a loaded model on the CPU. Output: the same model, its `nn.Linear` layers replaced by `PackedLinear` (weights as
oneDNN's matrix product wants them), its attention, where that is transformers' `sdpa`, by `blocked_attention`; and a
process whose allocator keeps what is freed. Where torch has no oneDNN, or the C library is another, that part is left
out. What each gains: docs/scoring.md. Executor side; pure but for the allocator.
"""

import contextlib
import ctypes
from typing import Any

import torch

_DTYPES = (torch.float32, torch.bfloat16)
_ATTENTION = "miniplm_blocked"
# Queries of one block; above _LONGEST torch's own kernel is as quick.
_BLOCK = 64
_LONGEST = 768
# Keywords of attention functions that change the result, beside mask and scale.
_SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "cache")
# mallopt's parameters, malloc.h. The threshold for mmap is the largest that glibc takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MMAP_BYTES = 1 << 30, 1 << 25


def prepare(model: Any) -> None:
    """Does all three to a model in place."""
    keep_freed_memory()
    pack_linears(model)
    if model.config._attn_implementation == "sdpa" and model.dtype == torch.float32:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(_ATTENTION, blocked_attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


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
        and weight.dtype in _DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linears(model: Any) -> None:
    """Packs the linear layers of a model in place, except its output layer, which `head.Head` cuts into tiles."""
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses do something of their own; the shared output layer stays what the embedding knows.
            if type(layer) is torch.nn.Linear and layer is not output and can_pack(layer.weight):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))


def blocked_attention(
    module: torch.nn.Module, query_BHTd: torch.Tensor, key_BKTd: torch.Tensor, value_BKTd: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention in blocks of queries, each against the keys up to its end.

    Axes: H query heads in K groups of G, which share a key head; d a head's size. What is not plain causal
    attention of a short window goes to transformers' `sdpa`.

    Returns:
        Shape (B, T, H, d), as transformers wants it, and no weights.
    """
    n_batch, n_heads, n_tokens, size = query_BHTd.shape
    is_plain = attention_mask is None and key_BKTd.shape[2] == n_tokens <= _LONGEST
    is_causal = others.get("is_causal") is not False and getattr(module, "is_causal", True)
    if not (is_plain and is_causal) or any(others.get(name) is not None for name in _SPECIAL):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(
            module, query_BHTd, key_BKTd, value_BKTd, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    n_keys, value_size = key_BKTd.shape[1], value_BKTd.shape[3]
    group = n_heads // n_keys
    query_NGTd = (query_BHTd * (scaling if scaling is not None else size**-0.5)).reshape(-1, group, n_tokens, size)
    key_NdT = key_BKTd.reshape(-1, n_tokens, size).transpose(1, 2)
    value_NTd = value_BKTd.reshape(-1, n_tokens, value_size)
    out_BTHd = query_BHTd.new_empty(n_batch, n_tokens, n_heads, value_size)
    out_BKGTd = out_BTHd.view(n_batch, n_tokens, n_keys, group, value_size).permute(0, 2, 3, 1, 4)
    future = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=query_BHTd.dtype).triu(1)
    for start in range(0, n_tokens, _BLOCK):
        end = min(start + _BLOCK, n_tokens)
        rows = end - start
        weights = torch.bmm(query_NGTd[:, :, start:end].reshape(-1, group * rows, size), key_NdT[:, :, :end])
        weights.view(-1, group, rows, end)[..., start:].add_(future[:rows, :rows])
        found = torch.bmm(torch.softmax(weights, dim=-1), value_NTd[:, :end])
        out_BKGTd[:, :, :, start:end] = found.view(n_batch, n_keys, group, rows, value_size)
    return out_BTHd, None
