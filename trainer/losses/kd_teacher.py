"""The teacher of Vanilla KD: a frozen model that predicts the student's inputs in every step.

A `Teacher` is no torch module: DDP and FSDP do not see it, no optimiser or checkpoint holds it, and each rank has a
whole copy. teacher_loading.py makes it from the config. Its logits are computed for a few positions at a time.
Axes in tensor names: B sequences, T input tokens, D hidden size of the teacher, n positions, K ids of the tokenizer.
Needs torch alone; reads and writes nothing.
"""

from typing import Any

import torch

from miniplm_udf.scoring.head import Head


class Teacher:
    """A frozen causal LM and its output layer.

    Args:
        model: a loaded causal LM of transformers, in eval mode, on its device.
        n_ids: K, ids of the tokenizer; the teacher's other entries are padding of its vocabulary.
        bos_id: id of the token in front of every input, as in the model's pre-training; None for no token.

    Attributes:
        model: the causal LM.
        n_ids: K.
    """

    def __init__(self, model: Any, n_ids: int, bos_id: int | None = None):
        self.model, self.n_ids, self._bos_id = model, n_ids, bos_id
        self._head = Head(model)

    @torch.no_grad()
    def hidden(self, inputs_BT: torch.Tensor, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the decoder, outside of autocast.

        Args:
            inputs_BT: int64 input ids.
            positions_BT: int64 positions of the tokens in their documents; None: 0, 1, ... in each sequence.

        Returns:
            Hidden states of the same positions, (B, T, D), in the model's dtype.
        """
        extra = {} if positions_BT is None else {"position_ids": positions_BT}
        if self._bos_id is not None:
            inputs_BT = torch.nn.functional.pad(inputs_BT, (1, 0), value=self._bos_id)
        with torch.autocast(inputs_BT.device.type, enabled=False):
            hidden_BTD: torch.Tensor = self.model.base_model(input_ids=inputs_BT, use_cache=False, **extra)[0]
        return hidden_BTD if self._bos_id is None else hidden_BTD[:, 1:]

    @torch.no_grad()
    def logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Computes the logits of the tokenizer's ids, as the model itself computes them.

        Args:
            hidden_nD: hidden states of some positions.

        Returns:
            Float32 logits (n, K), in new memory.
        """
        with torch.autocast(hidden_nD.device.type, enabled=False):
            return self._head.logits(hidden_nD)[:, : self.n_ids]
