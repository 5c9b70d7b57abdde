"""From hidden states to -log p of given targets, without the logits of all positions at once.

    nll_N = logsumexp_v(f(hidden_ND W_DV)) - f(hidden_ND W_DV)[target_N]

with f what the architecture does to its logits: a soft-cap (Gemma-2), a scale (Cohere), a divisor (Granite). Axes: B
rows, T positions, N scored positions of a batch, D hidden size, V vocabulary. A tile of N at a time; the logsumexp is
in float32 whatever the model's dtype. An f that it does not know, it cannot see: `models.load_model` probes for that.
Executor side (and the trainer's evaluation); pure.
"""

from typing import Any

import torch

from miniplm_udf.errors import ModelLoadError

# Elements of one tile of logits: 128 MiB in float32. Measured on 2 cores, tiles a tenth of it are 1.5 times as slow.
_TILE_ELEMENTS = 32 * 1024 * 1024


class Head:
    """The output layer of a causal LM of transformers, applied in tiles."""

    def __init__(self, model: Any) -> None:
        """Takes the layer and what is done to its logits from the model.

        Raises:
            ModelLoadError: if the model has no output layer, or no decoder beneath it.
        """
        self._project = model.get_output_embeddings()
        self.decoder = getattr(model, "base_model", None)
        if self._project is None or self.decoder is None or self.decoder is model:
            raise ModelLoadError(
                f"{type(model).__name__}: expected a causal LM with a decoder and an output layer "
                f"(get_output_embeddings), found none; this architecture cannot be scored"
            )
        config = model.config.get_text_config()
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def hidden(self, input_BT: torch.Tensor) -> torch.Tensor:
        """The decoder's last hidden states, shape (B, T, D). Right padding needs no mask: the model is causal."""
        return self.decoder(input_ids=input_BT, use_cache=False)[0]  # type: ignore[misc]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Float32 logits of some positions, shape (..., V), as the model itself would give them."""
        logits_NV = self._project(hidden_ND).float()
        if self._scale != 1.0:
            logits_NV = logits_NV * self._scale
        if self._soft_cap:
            logits_NV = torch.tanh(logits_NV / self._soft_cap) * self._soft_cap
        return logits_NV

    def nll(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """-log p of the targets in nats, float32, shape (N,)."""
        tile = max(1, _TILE_ELEMENTS // max(1, int(self._project.weight.shape[0])))
        parts = []
        for hidden_nD, target_n in zip(hidden_ND.split(tile), target_N.split(tile), strict=True):
            logits_nV = self.logits(hidden_nD)
            picked_n = logits_nV.gather(1, target_n[:, None]).squeeze(1)
            parts.append(torch.logsumexp(logits_nV, dim=1) - picked_n)
        return torch.cat(parts) if parts else torch.zeros(0)
