"""Model FLOPs of forward passes: 2 for each token and parameter in a matrix product, and the products of attention.

    FLOPs(forward) = 2 P T + 2 layers width sum over windows of L^2
    P parameters in matrix products, T input tokens, L tokens of a window (causal: on average a token attends to
    half of its window)

Arithmetic only; loads nothing. Driver or executor; pure.
"""

from collections.abc import Sequence


def forward_flops(parameters: int, layers: int, width: int, windows: Sequence[int]) -> float:
    """The FLOPs of forward passes.

    Args:
        parameters: parameters in matrix products.
        layers: layers with attention.
        width: width of attention: number of heads times the size of a head.
        windows: tokens of each window.

    Returns:
        Floating-point operations; a multiplication and an addition count as two.
    """
    return 2.0 * parameters * sum(windows) + 2.0 * layers * width * sum(length**2 for length in windows)
