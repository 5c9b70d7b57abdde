"""Model FLOPs of forward passes: 2 for each parameter in a matrix product and token, and causal attention's products.

    FLOPs(forward) = 2 P T + 2 layers width sum over windows of L^2
    P parameters in matrix products, T input tokens, L tokens of a window (a token sees half of it on average: causal)

Arithmetic alone; loads nothing. Driver or executor.
"""

from collections.abc import Sequence


def forward_flops(parameters: int, layers: int, width: int, windows: Sequence[int]) -> float:
    """FLOPs of forward passes.

    Args:
        parameters: in matrix products.
        layers: with attention.
        width: of attention: heads times a head's size.
        windows: tokens of each.
    """
    return 2.0 * parameters * sum(windows) + 2.0 * layers * width * sum(length**2 for length in windows)
