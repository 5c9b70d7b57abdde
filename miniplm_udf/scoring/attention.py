"""Attention that is faster for scoring than the attention that transformers chooses, with equal results.

Input: a loaded model whose attention is transformers' `sdpa`. Output: the same model with `blocked_attention` (on a
CPU, float32), or with `sdpa` without a mask (`causal_mask`; while torch compiles, transformers always makes a mask,
which rules out the flash kernels). The equality is tested on the model itself; if it fails, nothing is changed.
Executor side; pure, except for names that are registered with transformers.
"""

import logging
from typing import Any

import torch

LOGGER = logging.getLogger("miniplm.scorer")

_BLOCKED, _MASKLESS = "miniplm_blocked", "miniplm_maskless"
# Queries in one block. For windows longer than _LONGEST torch's own kernel is as fast (docs/scoring.md).
_BLOCK = 32
_LONGEST = 1280
# Keywords of attention functions that change the result, besides mask and scale.
_SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "cache")
# Largest difference, relative to the largest hidden state, in float32 and in bfloat16.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.05


def improve_attention(model: Any) -> None:
    """Switches a model from `sdpa` to the faster attention, if that gives the same hidden states.

    Args:
        model: a loaded model of transformers; changed in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation != "sdpa":
        return
    is_blocked = model.device.type == "cpu" and model.dtype == torch.float32
    name = _BLOCKED if is_blocked else _MASKLESS
    AttentionInterface.register(name, blocked_attention if is_blocked else sdpa_attention_forward)
    AttentionMaskInterface.register(name, causal_mask)
    # Longer than a block, but no longer than the model's context.
    length = min(_BLOCK + 16, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or _BLOCK))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    input_BT = (torch.arange(2 * length, device=model.device) * 7919 % vocab_size).view(2, length)
    with torch.inference_mode():
        before = model.base_model(input_ids=input_BT, use_cache=False)[0].float()
        model.set_attn_implementation(name)
        try:
            after = model.base_model(input_ids=input_BT, use_cache=False)[0].float()
        except (TypeError, AttributeError) as error:
            # The model computes with the mask (DeepSeek-V3.2's choice of keys), and `causal_mask` gave it None.
            LOGGER.info("%s: keeps the attention of transformers (it needs a mask: %s)", type(model).__name__, error)
            model.set_attn_implementation("sdpa")
            return
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    if not difference <= (_TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_HALF):
        LOGGER.info("%s: keeps the attention of transformers (ours differs by %.2g)", type(model).__name__, difference)
        model.set_attn_implementation("sdpa")


def plain_attention(model: Any) -> None:
    """Takes back `improve_attention`, whose attention ignores the borders of documents in a sequence.

    Args:
        model: a loaded model of transformers; changed in place.
    """
    if model.config._attn_implementation in (_BLOCKED, _MASKLESS):
        model.set_attn_implementation("sdpa")


def causal_mask(
    batch_size: int, q_length: int, kv_length: int, *arguments: Any, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, **others: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Returns the mask of a layer: None for plain causal attention, otherwise the mask of transformers' `sdpa`.

    Ignores `allow_is_causal_skip`: a compiled model never allows it, because its input might be packed sequences, and
    here it never is. A model that needs the mask for another reason shows in `improve_attention`.

    Args:
        batch_size: sequences in the batch.
        q_length: queries, in tokens.
        kv_length: keys, in tokens; more than the queries if keys are cached.
        attention_mask: which tokens are no padding, shape (B, T) bool; None: all of them.
        local_size: tokens that a sliding window holds; None: no window.
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
    """Computes causal attention in blocks of queries, each against the keys up to the block's end.

    Axes: H query heads in K groups of G, each group with one key head; d the size of a head. Anything but plain causal
    attention in a short window is left to transformers' `sdpa`.

    Args:
        module: the attention layer.
        query_BHTd: queries, shape (B, H, T, d).
        key_BKTd: keys, shape (B, K, T, d).
        value_BKTd: values, shape (B, K, T, size of a value).
        attention_mask: None for plain causal attention.
        dropout: share of the weights that is dropped, used by transformers' `sdpa` alone.
        scaling: factor of the products of queries and keys; None: 1 / sqrt(d).

    Returns:
        The result, shape (B, T, H, d), as transformers expects it, and None in place of the attention weights.
    """
    n_batch, n_heads, n_tokens, size = query_BHTd.shape
    # A compiler would unroll the loop below for one length.
    is_traced = torch.compiler.is_dynamo_compiling()
    is_plain = not is_traced and attention_mask is None and key_BKTd.shape[2] == n_tokens <= _LONGEST
    is_causal = others.get("is_causal") is not False and getattr(module, "is_causal", True)
    if not (is_plain and is_causal) or any(others.get(name) is not None for name in _SPECIAL):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out_BTHd, _ = sdpa_attention_forward(
            module, query_BHTd, key_BKTd, value_BKTd, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out_BTHd, None
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
        block = torch.bmm(torch.softmax(weights, dim=-1), value_NTd[:, :end])
        out_BKGTd[:, :, :, start:end] = block.view(n_batch, n_keys, group, rows, value_size)
    return out_BTHd, None
