"""How often the 90 % intervals of scaling fits hold the truth: minutes of fits, the table in docs/scaling-laws.md."""

import numpy as np
import pytest

from tests.support.scaling_losses import MINIPLM, WITHOUT_KD, losses, runs_of_one_point
from trainer.scaling.laws import LossCurve, compute_saved, extrapolate, fit_law


def covering_share(computes: np.ndarray, scatter: float, *, one_curve: bool = False) -> dict[str, float]:
    """Share of the intervals that contain the true value, over 200 draws from the two laws."""
    hits = dict.fromkeys(("exponent", "floor", "loss at 1T tokens", "compute saved"), 0)
    for seed in range(200):
        drawn = [losses(of, scatter, (seed, number), computes) for number, of in enumerate((WITHOUT_KD, MINIPLM))]
        fit, other = (
            fit_law(
                [LossCurve(compute_flop=tuple(computes), loss=tuple(loss))]
                if one_curve
                else runs_of_one_point(loss, computes),
                replicates=100,
                seed=seed,
            )
            for loss in drawn
        )
        truths = {
            "exponent": (fit.exponent, WITHOUT_KD.exponent),
            "floor": (fit.floor, WITHOUT_KD.floor),
            "loss at 1T tokens": (extrapolate(fit, 1.26e21), WITHOUT_KD.loss(1.26e21)),
            "compute saved": (compute_saved(other, fit, 5e19), 5e19 / MINIPLM.compute(WITHOUT_KD.loss(5e19))),
        }
        for name, (estimate, truth) in truths.items():
            hits[name] += estimate.low <= truth <= estimate.high
    return {name: count / 200 for name, count in hits.items()}


@pytest.mark.parametrize(
    ("n_points", "one_curve"), [(12, False), (8, False), (40, True)], ids=["12 runs", "8 runs", "a curve of 40 points"]
)
def test_intervals_of_90_percent_cover_the_truth(n_points: int, one_curve: bool) -> None:
    """The table in docs/scaling-laws.md has these shares; `-s` prints them."""
    shares = covering_share(np.logspace(18, 19.8, n_points), 0.003, one_curve=one_curve)
    print(n_points, shares)
    assert {name: share for name, share in shares.items() if not 0.8 <= share <= 0.98} == {}
