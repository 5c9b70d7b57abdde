"""The quality of a proxy: its predictions compared with true scores of held-out rows. Pure arithmetic with numpy.

    Spearman's rho of prediction and score; the share of the true top alpha that the predicted top alpha contains

By chance, that share is alpha. Rows are held out by a hash of their ids, so they relate to the fitted rows as unscored
instances do: both may have neighbours and copies among the fitted rows. The scores of the held-out rows come to the
driver, some ten thousand pairs of numbers. Judges and warns; refuses nothing.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniplm_udf.store.proxy_records import Quality, TopShare

if TYPE_CHECKING:
    import numpy as np

RATIOS = (0.1, 0.25, 0.5)
# Below this, the half chosen by the proxy has 0.56 of the true half, hardly more than a random half.
WORTHLESS = 0.2


def judge(ids: Sequence[str], scores: Sequence[float], predictions: Sequence[float]) -> Quality:
    """Computes the quality of predictions.

    Args:
        ids: of the rows; they break ties, as in a selection.
        scores: true scores, in the order of `ids`.
        predictions: in the order of `ids`.
    """
    import numpy as np

    true, predicted = np.asarray(scores, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    names = np.asarray(ids)
    return Quality(
        n_rows=len(names),
        spearman=spearman(true, predicted),
        spearman_error=1 / math.sqrt(max(1, len(names) - 1)),
        top={
            str(ratio): TopShare(kept=_kept(names, true, predicted, ratio), chance=ratio)
            for ratio in RATIOS
            if ratio * len(names) >= 1
        },
    )


def spearman(first: "np.ndarray", second: "np.ndarray") -> float | None:
    """Computes Spearman's correlation of two lists of values; ties get mean ranks.

    Args:
        first: values, shape (n,).
        second: values, shape (n,).

    Returns:
        From -1 to 1; None if all values of either are equal.
    """
    import numpy as np

    ranks = [_ranks(values) for values in (first, second)]
    if any(np.ptp(values) == 0 for values in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: "np.ndarray") -> "np.ndarray":
    import numpy as np

    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _kept(ids: "np.ndarray", true: "np.ndarray", predicted: "np.ndarray", ratio: float) -> float:
    """The share of the true top `ratio` that is in the predicted top `ratio`."""
    import numpy as np

    n_top = math.floor(ratio * len(ids))
    tops = [set(np.lexsort((ids, -values))[:n_top].tolist()) for values in (true, predicted)]
    return len(tops[0] & tops[1]) / n_top


def warnings(quality: Quality) -> list[str]:
    """Writes sentences to read before a corpus is chosen by these predictions.

    Args:
        quality: as `judge` returns it.

    Returns:
        The sentences; none for a useful proxy.
    """
    rho, error = quality.spearman, quality.spearman_error
    if rho is not None and rho >= max(WORTHLESS, 2 * error):
        return []
    order = "no order at all" if rho is None else f"Spearman {rho:.3f} (by chance 0 ± {error:.3f})"
    return [
        f"the proxy is worthless here: on {quality.n_rows} held-out instances its predictions have {order} with the "
        "true score, so its choice is hardly better than a random one; score the pool with the models"
    ]
