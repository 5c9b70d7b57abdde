"""Laws of the paper, and losses drawn from a law with scatter."""

import math
from collections.abc import Iterable

import numpy as np

from trainer.scaling.laws import LossCurve, ScalingLaw


def law(coefficient: float, exponent: float, floor: float) -> ScalingLaw:
    return ScalingLaw(coefficient=coefficient, exponent=exponent, floor=floor)


# arXiv 2410.17215: compute at 1T tokens; for each method, the law and its losses at 1T and 10T tokens.
PAPER = {
    "200M": (1.26e21, {
        "without_kd": (law(2.19e7, 0.41, 3.30), (3.35, 3.32)),
        "vanilla_kd": (law(9.77e7, 0.44, 3.34), (3.39, 3.35)),
        "miniplm": (law(8.56e10, 0.59, 3.25), (3.28, 3.26)),
    }),
    "500M": (3.14e21, {
        "without_kd": (law(2.73e8, 0.45, 3.06), (3.12, 3.08)),
        "vanilla_kd": (law(3.14e8, 0.45, 3.05), (3.12, 3.07)),
        "miniplm": (law(6.64e9, 0.52, 3.03), (3.06, 3.04)),
    }),
    "1.2B": (7.30e21, {
        "without_kd": (law(1.88e8, 0.43, 2.91), (2.98, 2.94)),
        "vanilla_kd": (law(1.10e10, 0.52, 2.90), (2.95, 2.91)),
        "miniplm": (law(4.29e8, 0.45, 2.86), (2.92, 2.88)),
    }),
}  # fmt: skip
WITHOUT_KD, MINIPLM = PAPER["200M"][1]["without_kd"][0], PAPER["200M"][1]["miniplm"][0]
COMPUTE = np.logspace(18, 19.8, 12)


def losses(
    of: ScalingLaw, scatter: float = 0.0, seed: int | tuple[int, int] = 0, compute: np.ndarray = COMPUTE
) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, scatter, len(compute))
    return [of.loss(flop) * math.exp(error) for flop, error in zip(compute, noise, strict=True)]


def runs_of_one_point(loss: Iterable[float], compute: np.ndarray = COMPUTE) -> list[LossCurve]:
    return [LossCurve(compute_flop=(flop,), loss=(value,)) for flop, value in zip(compute.tolist(), loss, strict=True)]
