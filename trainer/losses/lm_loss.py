"""A causal LM and its training loss as one module, so that DDP and FSDP wrap both.

Axes in tensor names: B sequences, T input tokens, N = B * T, V entries of the vocabulary, D hidden size.
Inputs: token ids, targets and the weights of the targets (loss.py). Output: the weighted sum of -log p, in nats, or
with a teacher its mixture with the KL divergence from the teacher. The decoder gives hidden states, and `chunked_head`
the loss without the logits of all positions. That is exact only where the model's logits are the product of the hidden
states and a weight. For another output layer (a bias, a soft cap, a scale), the model's own `.logits` are used. The
module tests the model when it is created, to choose between the two. Needs torch and transformers; reads and writes
nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from miniplm_udf.storage import Json
from trainer.losses.chunked_head import chunk_loss, chunked_losses, losses_of_logits, weighted_nll
from trainer.losses.kd_loss import kd_chunk_loss, kd_chunk_positions, kd_losses
from trainer.losses.kd_teacher import Teacher
from trainer.losses.loss import target_nll

# The test enlarges the logits to this size: a soft cap does not change the small logits of new weights.
_LARGEST_LOGIT = 100.0
_PROBE_TOKENS = 4


class Losses(NamedTuple):
    """The result of a forward pass: sums over targets of weight * loss, in nats.

    Attributes:
        total: the loss to differentiate, a float32 scalar.
        parts_P: losses that are only logged, float32, without a gradient: (P,) with P = 0 without a teacher; with a
            teacher P = 2, -log p of the targets and the KL divergence from the teacher.
    """

    total: torch.Tensor
    parts_P: torch.Tensor


class CausalLMWithLoss(torch.nn.Module):
    """A causal LM whose forward pass returns the loss.

    Args:
        model: a causal LM of transformers, or a module whose forward pass takes `input_ids` and returns `.logits`.
            It is already on its device, and not sharded yet.

    Attributes:
        model: the causal LM.
        teacher: the frozen model that the loss compares with; None: the loss is -log p of the targets.
        has_plain_head: whether the loss is computed in chunks; false: through `.logits`.
        chunk_loss: computes the loss of a chunk; `blocks.prepare_blocks` replaces it with a compiled one.
    """

    teacher: Teacher | None = None

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model: Any = model
        self.has_plain_head = has_plain_head(model)
        self.chunk_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = chunk_loss

    def forward(
        self,
        inputs_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
    ) -> Losses:
        """Computes sum(weight * -log p of the target).

        Args:
            inputs_BT: int64 input ids.
            targets_BT: int64 ids to predict.
            weights_BT: float32 weights of the targets.
            positions_BT: int64 positions of the tokens in their documents; None: 0, 1, ... in each sequence.

        Returns:
            The loss as a float32 scalar, in nats; `parts_P` is empty.
        """
        if self.has_plain_head:
            hidden_ND, weight_VD = self._hidden(inputs_BT, positions_BT)
            loss = weighted_nll(hidden_ND, weight_VD, targets_BT.flatten(), weights_BT.flatten(), self.chunk_loss)
        else:
            loss = (target_nll(self._logits(inputs_BT, positions_BT), targets_BT) * weights_BT).sum()
        return Losses(loss, loss.new_empty(0))

    def _hidden(self, inputs_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's hidden states, (N, D), and the weight of the output layer, (V, D)."""
        hidden_BTD = self.model.base_model(input_ids=inputs_BT, **_positions(positions_BT))[0]
        # Read here and not kept: FSDP puts the whole weight in its place for the forward pass.
        return hidden_BTD.flatten(0, 1), self.model.get_output_embeddings().weight

    def _logits(self, inputs_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        """The model's own logits, (B, T, V)."""
        logits_BTV: torch.Tensor = self.model(input_ids=inputs_BT, **_positions(positions_BT)).logits
        return logits_BTV


class DistilledCausalLM(CausalLMWithLoss):
    """A causal LM whose loss also compares its predictions with a teacher's (kd_loss.py).

    Args:
        model: the student, as for `CausalLMWithLoss`.
        teacher: the frozen teacher on the same device. It is no torch module, so its weights do not belong to this
            module.
        ratio: share of the KL divergence in the loss, above 0 and at most 1.
    """

    def __init__(self, model: torch.nn.Module, teacher: Teacher, ratio: float):
        super().__init__(model)
        self.teacher: Teacher = teacher
        self.ratio, self.chunk_loss = ratio, kd_chunk_loss

    def forward(
        self,
        inputs_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
    ) -> Losses:
        """Computes sum(weight * ((1 - ratio) * -log p of the target + ratio * KL(teacher || student))).

        Args:
            inputs_BT, targets_BT, weights_BT, positions_BT: as for `CausalLMWithLoss`.

        Returns:
            The mixed loss as a float32 scalar, in nats, and the two losses that it mixes.
        """
        # The teacher comes first: its activations are freed before the student's activations are kept.
        teacher_ND = self.teacher.hidden(inputs_BT, positions_BT).flatten(0, 1)
        targets_N, weights_N = targets_BT.flatten(), weights_BT.flatten()

        def teacher_logits(part: slice) -> torch.Tensor:
            return self.teacher.logits(teacher_ND[part])

        losses_of = kd_losses(teacher_logits, targets_N, weights_N, self.ratio, self.chunk_loss)
        if self.has_plain_head:
            hidden_ND, weight_VD = self._hidden(inputs_BT, positions_BT)
            size = kd_chunk_positions(len(targets_N), len(weight_VD), weight_VD.device.type)
            return Losses(*chunked_losses(hidden_ND, weight_VD, losses_of, 3, size))
        logits_NV = self._logits(inputs_BT, positions_BT).flatten(0, 1)
        size = kd_chunk_positions(len(targets_N), logits_NV.shape[1], logits_NV.device.type)
        return Losses(*losses_of_logits(logits_NV, losses_of, 3, size))


def _positions(positions_BT: torch.Tensor | None) -> Json:
    """Arguments of a forward pass. A cache would keep transformers from building the mask of the documents."""
    return {} if positions_BT is None else {"position_ids": positions_BT, "use_cache": False}


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether a model's logits are the product of its decoder's hidden states and the output layer's weight.

    The test runs the model on a few tokens, replaces the hidden states by larger values, and compares the logits.

    Args:
        model: any module; it stays as it is.
    """
    decoder: Any = getattr(model, "base_model", None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if decoder is None or decoder is model or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    enlarged: list[torch.Tensor] = []

    def enlarge(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0]
        enlarged.append(hidden * (_LARGEST_LOGIT / head(hidden).abs().max()))
        if isinstance(output, tuple):
            return (enlarged[0], *output[1:])
        output[next(iter(output))] = enlarged[0]
        return output

    was_training = model.training
    model.train()  # a dropout in front of the output layer would show
    handle = decoder.register_forward_hook(enlarge)
    try:
        tokens_BT = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % len(head.weight)
        logits_BTV = model(input_ids=tokens_BT).logits.float()
    finally:
        handle.remove()
        model.train(was_training)
    if not enlarged:  # its forward pass runs a part of `base_model` alone
        return False
    expected_BTV = head(enlarged[0]).float()
    return expected_BTV.shape == logits_BTV.shape and torch.allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-3)
