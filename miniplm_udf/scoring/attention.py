"""Attention that is quicker for scoring than what transformers chooses, and equal to it.

Input: a loaded model whose attention is transformers' `sdpa`. Output: the same model with `blocked_attention` (a CPU,
float32), or with `sdpa` that needs no mask (`causal_mask`; inside `torch.compile` transformers always makes one, which
shuts out the flash kernels). Whether it is equal is tried on the model itself; where not, nothing is changed. Executor
side; pure but for names registered with transformers.
"""

import logging
from typing import Any

import torch

LOGGER = logging.getLogger("miniplm.scorer")

_BLOCKED, _MASKLESS = "miniplm_blocked", "miniplm_maskless"
# Queries of one block; above _LONGEST torch's own kernel is as quick (docs/scoring.md).
_BLOCK = 32
_LONGEST = 1280
# Keywords of attention functions that change the result, beside mask and scale.
_SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "cache")
# Of the largest hidden state.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.05


def improve_attention(model: Any) -> None:
    """Switches a model to ours, where its attention is `sdpa` and ours gives the same hidden states."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation != "sdpa":
        return
    is_blocked = model.device.type == "cpu" and model.dtype == torch.float32
    name = _BLOCKED if is_blocked else _MASKLESS
    AttentionInterface.register(name, blocked_attention if is_blocked else sdpa_attention_forward)
    AttentionMaskInterface.register(name, causal_mask)
    # Longer than a block, and no longer than the model takes.
    length = min(_BLOCK + 16, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or _BLOCK))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    input_BT = (torch.arange(2 * length, device=model.device) * 7919 % vocab_size).view(2, length)
    with torch.inference_mode():
        before = model.base_model(input_ids=input_BT, use_cache=False)[0].float()
        model.set_attn_implementation(name)
        after = model.base_model(input_ids=input_BT, use_cache=False)[0].float()
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    if not difference <= (_TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_HALF):
        LOGGER.info("%s: attention as transformers has it (ours differs by %.2g)", type(model).__name__, difference)
        model.set_attn_implementation("sdpa")


def causal_mask(
    batch_size: int, q_length: int, kv_length: int, *arguments: Any, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, **others: Any,
) -> torch.Tensor | None:  # fmt: skip
    """No mask where the causal one is all there is; else that of transformers' `sdpa`.

    That none is asked for (`allow_is_causal_skip`) is not looked at: a compiled model always asks for one, for it might
    be given packed sequences, which ours is not. Other reasons show in `improve_attention`.
    """
    if attention_mask is None and q_length == kv_length and (local_size is None or kv_length < local_size):
        return None
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, *arguments, attention_mask=attention_mask, local_size=local_size, **others
    )
    return mask


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
