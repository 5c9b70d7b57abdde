"""Linear layers in float8 (e4m3) for `dtype: float8`: twice the matrix products per second on a GPU that has them.

    y_TN = (q(x_TK / a_T1) q(w_NK / b_N1)^T) * a_T1 * b_1N + bias_N        a, b = max |row| / 448,  q rounds to e4m3

Axes: T tokens, K inputs, N outputs of a layer. Each token has its own scale, so a text's score does not depend on the
other texts of its batch; each output of a weight has its own, computed once. Input: a loaded model in bfloat16. Output:
the same model with `Float8Linear` in its decoder. Embeddings, norms, the products of attention, the output layer,
routers, stacked experts and layers whose sizes are no multiples of 16 stay bfloat16. Executor side; pure.
"""

import logging
from typing import Any

import torch

from miniplm_udf.errors import ModelLoadError, first_line
from miniplm_udf.scoring.model_flops import matrix_parameters

LOGGER = logging.getLogger("miniplm.scorer")

_DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_DTYPE).max
# A row of smaller numbers has the scale of this number, since a row of zeros must not be divided by zero.
_SMALLEST_MAXIMUM = 1e-12
# The kernels take matrices whose sizes are multiples of this.
_MULTIPLE = 16
# A router chooses experts by the order of its outputs, which rounding changes. It is a small layer.
_ROUTERS = ("gate", "router")


def quantised(values_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to float8, each row with its own scale.

    Args:
        values_RK: shape (R, K), any float dtype.

    Returns:
        The rounded rows divided by their scales, shape (R, K), float8 e4m3; the scales, shape (R, 1), float32. A row
        with an infinity or a NaN is NaN.
    """
    largest_R1 = values_RK.abs().amax(dim=1, keepdim=True).float()
    scale_R1 = largest_R1.clamp(min=_SMALLEST_MAXIMUM) / _LARGEST
    # The division of bfloat16 by float32 is in float32. No quotient is large enough to become NaN in float8.
    return (values_RK / scale_R1).to(_DTYPE).contiguous(), scale_R1


class Float8Linear(torch.nn.Module):
    """A linear layer, x W^T + b, whose product is computed in float8. For inference only."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        """Quantises a copy of the weight.

        Args:
            weight_NK: shape (N, K); both must be multiples of 16.
            bias_N: shape (N,), or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        weight_NK, scale_N1 = quantised(weight_NK.detach())
        self.register_buffer("_weight_NK", weight_NK, persistent=False)
        self.register_buffer("_scale_1N", scale_N1.t().contiguous(), persistent=False)
        self.bias = bias_N

    @property
    def weight(self) -> torch.Tensor:
        """The weight in bfloat16, computed at each access; a few architectures read the weight of another layer."""
        return (self._weight_NK.float() * self._scale_1N.t()).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: shape (..., K), bfloat16.

        Returns:
            x @ weight.T + bias, shape (..., N), bfloat16.
        """
        x_TK, scale_T1 = quantised(x.reshape(-1, self.in_features))
        # Fast accumulation keeps about 14 bits of the sums, where the inputs have 4.
        y_TN = torch._scaled_mm(
            x_TK, self._weight_NK.t(), scale_a=scale_T1, scale_b=self._scale_1N,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        if self.bias is not None:
            y_TN = y_TN + self.bias
        return y_TN.view(*x.shape[:-1], self.out_features)


def use_float8(model: Any) -> None:
    """Replaces the linear layers of a model's decoder by float8 layers, in place.

    Args:
        model: a causal LM of transformers in bfloat16, on its device.

    Raises:
        ModelLoadError: the device has no float8 products, or the decoder has no layer for them.
    """
    name = type(model).__name__
    check_device(model.device)
    total, replaced = matrix_parameters(model), 0
    for parent in list(model.base_model.modules()):
        for child, layer in list(parent.named_children()):
            if can_quantise(child, layer):
                setattr(parent, child, Float8Linear(layer.weight, layer.bias))
                replaced += layer.weight.numel()
    if not replaced:
        raise ModelLoadError(
            f"{name}: dtype: expected linear layers (torch.nn.Linear) in the decoder whose sizes are multiples of "
            f"{_MULTIPLE}, found none, so nothing would be computed in float8; set dtype: bfloat16"
        )
    LOGGER.info("%s: %.0f %% of the parameters in matrix products are in float8", name, 100 * replaced / total)


def can_quantise(name: str, layer: torch.nn.Module) -> bool:
    """Whether a layer of a decoder is computed in float8.

    Args:
        name: the layer's name in its parent.
        layer: the layer.
    """
    # Subclasses may compute something else.
    return (
        type(layer) is torch.nn.Linear
        and name not in _ROUTERS
        and all(size % _MULTIPLE == 0 for size in layer.weight.shape)
    )


def check_device(device: torch.device) -> None:
    """Multiplies two small matrices in float8 and compares the result with the exact product.

    Args:
        device: where the model is.

    Raises:
        ModelLoadError: torch cannot multiply float8 matrices with a scale for each row there, or the result is wrong.
    """
    left_T, right_N = 2.0 ** (torch.arange(16, device=device) % 4), 1.0 + torch.arange(16, device=device)
    eye_KK = torch.eye(16, device=device)
    try:
        layer = Float8Linear((right_N[:, None] * eye_KK).bfloat16())
        product_TN = layer(left_T[:, None].expand(16, 16).bfloat16())
        reason = "" if torch.allclose(product_TN.float(), left_T[:, None] * right_N, rtol=0.02) else "a wrong product"
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        reason = first_line(error)
    if reason:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise ModelLoadError(
            f"dtype: float8: expected a device on which torch multiplies float8 matrices (an NVIDIA GPU of compute "
            f"capability 8.9 or newer), found {where}: {reason}; set dtype: bfloat16"
        )
