"""The loops that people write to score text with transformers, as `bench_score` times them. No loop is ours.

Input: a plain model of transformers, token ids of each text. Output: the sum of -log p in nats of each. Written from
descriptions: `padded` takes texts in corpus order, padded to the context, 16 at a time, with the logits of all
positions in float32; `sorted_by_length` sorts first and pads to the longest of a batch; `official` takes instances of
one length, 16 at a time, as MiniPLM's own scoring does: the logits of all, a cross-entropy without reduction, a mask.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from miniplm_udf.scoring.flops import forward_flops


@torch.inference_mode()
def _batch(model: Any, rows: Sequence[Sequence[int]], width: int) -> list[float]:
    """Nats of each row, from the logits of the whole batch."""
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)] = torch.tensor(row)
        mask_BT[number, : len(row)] = 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    log_p_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), dim=-1)
    log_p_BT = log_p_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return [float(total) for total in -(log_p_BT * mask_BT[:, 1:]).sum(-1)]


def padded(model: Any, texts: Sequence[Sequence[int]], context: int = 1024, batch_size: int = 16) -> list[float]:
    """In corpus order, padded to the context."""
    found: list[float] = []
    for start in range(0, len(texts), batch_size):
        found += _batch(model, texts[start : start + batch_size], context)
    return found


def sorted_by_length(model: Any, texts: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Longest first, padded to the longest of each batch."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    found = np.zeros(len(texts))
    for start in range(0, len(texts), batch_size):
        chosen = order[start : start + batch_size]
        rows = [texts[number] for number in chosen]
        found[chosen] = _batch(model, rows, max(map(len, rows)))
    return [float(total) for total in found]


@torch.inference_mode()
def official(model: Any, instances: Sequence[Sequence[int]], batch_size: int = 16) -> list[float]:
    """Instances of one length, in order."""
    found: list[float] = []
    for start in range(0, len(instances), batch_size):
        rows = instances[start : start + batch_size]
        # The lengths differ by a token or two: the instances were cut from text and are tokenised again.
        shape = (len(rows), max(map(len, rows)))
        ids_BT, is_text_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            is_text_BT[number, : len(row)] = 1
        ids_BT, mask_BT = ids_BT.to(model.device), is_text_BT[:, 1:].to(model.device)
        logits_BTV = model(input_ids=ids_BT[:, :-1], attention_mask=mask_BT, use_cache=False).logits.float()
        labels_N = ids_BT[:, 1:].reshape(-1)
        loss_N = torch.nn.functional.cross_entropy(logits_BTV.view(len(labels_N), -1), labels_N, reduction="none")
        found += [float(total) for total in (loss_N.view(mask_BT.shape) * mask_BT).sum(-1)]
    return found


def matrix_parameters(model: Any) -> int:
    """Parameters in matrix products, the output layer's among them."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))


def model_flops(model: Any, windows: Sequence[int]) -> float:
    """Model FLOPs of forward passes over windows of these many tokens."""
    config = model.config
    return forward_flops(matrix_parameters(model), config.num_hidden_layers, config.hidden_size, windows)
