"""From hidden states to -log p of given targets, without the logits of all positions at once.

    nll_N = logsumexp_v(f(hidden_ND W_DV)) - f(hidden_ND W_DV)[target_N]

f is what the architecture does to its logits: a soft-cap (Gemma-2), a scale (Cohere) or a divisor (Granite). Axes: B
rows, T positions, N scored positions of a batch, D hidden size, V vocabulary; small letters are tiles. A tile holds n x
v logits, few enough for a CPU's cache; a running logsumexp goes over the tiles, in float32 whatever the model's dtype.
Another f cannot be seen here: `models.load_model` tests for it. Executor side (and the trainer's evaluation); pure.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.compilation import Backend, CompiledFunction, CompiledLayers
from miniplm_udf.scoring.compiler_settings import limit_processes, use_disk_cache
from miniplm_udf.scoring.cpu import PackedLinear, can_pack, unpack_linears

# On a CPU 4 MiB of float32 logits, which stay in the cache (docs/scoring.md); on a GPU 128 MiB.
_TILE_ROWS = {"cpu": 256, "cuda": 2048}
_TILE_VOCABULARY = {"cpu": 4096, "cuda": 16384}


class Head:
    """The output layer of a causal LM of transformers, applied in tiles."""

    def __init__(self, model: Any) -> None:
        """Reads the decoder, the output layer and the settings of its logits from the model.

        Args:
            model: a loaded causal LM of transformers.

        Raises:
            ModelLoadError: the model has no output layer, or no decoder below it.
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
        weight = self._project.weight
        # In a model that is split over GPUs this is not the device of the input. Mamba's decoder returns float32,
        # whatever its dtype, and the model rounds it before the output layer.
        self._device, self._dtype = weight.device, weight.dtype
        self._tile_rows = _TILE_ROWS.get(weight.device.type, _TILE_ROWS["cuda"])
        self._tiles = _tiles(weight, getattr(self._project, "bias", None))
        self._layers: CompiledLayers | None = None
        self._tile_nll: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _tile_nll

    def compile(self, backend: Backend = "inductor") -> None:
        """Lets torch compile the decoder's layers, and fuse the operations after the matrix product.

        The compilation begins with the first use and runs in the background (`compilation`).

        Args:
            backend: compiler of torch; "inductor" except in tests.
        """
        use_disk_cache()
        limit_processes()
        if getattr(getattr(self.decoder, "config", None), "_attn_implementation", None) == "flex_attention":
            return  # flex attention compiles itself, which must not happen while another thread compiles
        unpack_linears(self.decoder)
        self._layers = CompiledLayers(self.decoder, backend)
        self._tile_nll = CompiledFunction(_tile_nll, "the output layer's log-softmax", backend)

    def hidden(self, input_BT: torch.Tensor) -> torch.Tensor:
        """Runs the decoder. Right padding needs no mask: the model is causal.

        Args:
            input_BT: token ids, padded on the right.

        Returns:
            The last hidden states, shape (B, T, D), in the dtype and on the device of the output layer.
        """
        with self._layers.active() if self._layers is not None else contextlib.nullcontext():
            hidden_BTD: torch.Tensor = self.decoder(input_ids=input_BT, use_cache=False)[0]  # type: ignore[misc]
        return hidden_BTD.to(self._device, self._dtype)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Computes the logits of some positions, as the model itself computes them.

        Args:
            hidden_ND: hidden states, shape (..., D).

        Returns:
            Float32 logits, shape (..., V).
        """
        return _transformed(self._project(hidden_ND.to(self._dtype)), self._scale, self._soft_cap)

    def nll(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Computes -log p of the targets.

        Args:
            hidden_ND: hidden states, shape (N, D).
            target_N: ids of the tokens to predict, shape (N,).

        Returns:
            Nats, float32, shape (N,).
        """
        parts = [
            self._rows_nll(hidden_nD, target_n)
            for hidden_nD, target_n in zip(
                hidden_ND.split(self._tile_rows), target_N.split(self._tile_rows), strict=True
            )
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _rows_nll(self, hidden_nD: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
        total_n = torch.full(target_n.shape, -torch.inf, dtype=torch.float32, device=target_n.device)
        picked_n = torch.zeros_like(total_n)
        # Compiled code is for any number of rows but 1, which is rare and would need code of its own.
        tile_nll = self._tile_nll if len(target_n) > 1 else _tile_nll
        first = 0
        for tile in self._tiles:
            logits_nv = tile(hidden_nD)
            total_n, picked_n = tile_nll(logits_nv, target_n - first, total_n, picked_n, self._scale, self._soft_cap)
            first += logits_nv.shape[1]
            # Frees the tile's memory before the next tile is made.
            del logits_nv
        return total_n - picked_n


def _tiles(weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The output layer cut along the vocabulary into functions, packed if possible."""
    size = _TILE_VOCABULARY.get(weight_VD.device.type, _TILE_VOCABULARY["cuda"])
    weights = weight_VD.split(size)
    biases = bias_V.split(size) if bias_V is not None else [None] * len(weights)
    if can_pack(weight_VD):
        return [PackedLinear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return [
        functools.partial(torch.nn.functional.linear, weight=weight, bias=bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _transformed(logits: torch.Tensor, scale: float, soft_cap: float | None) -> torch.Tensor:
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    return logits


def _tile_nll(
    logits_nv: torch.Tensor, target_n: torch.Tensor, total_n: torch.Tensor, picked_n: torch.Tensor,
    scale: float, soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Adds a tile to the running logsumexp and the targets' logits. `target_n` counts from the tile's start."""
    logits_nv = _transformed(logits_nv, scale, soft_cap)
    width = logits_nv.shape[1]
    inside_n = (target_n >= 0) & (target_n < width)
    logit_n = logits_nv.gather(1, target_n.clamp(0, width - 1)[:, None]).squeeze(1)
    total_n = torch.logaddexp(total_n, torch.logsumexp(logits_nv, dim=1))
    return total_n, torch.where(inside_n, logit_n, picked_n)
