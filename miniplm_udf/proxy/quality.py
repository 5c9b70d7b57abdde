"""How good a proxy is: its predictions beside true scores of rows that it was not fitted on. Pure arithmetic, numpy.

    Spearman's rho of prediction and score; of the true top alpha, the share that the predicted top alpha keeps

By chance the second is alpha. Rows are told by a hash of their ids, so they are to the fitted rows what the unscored
instances are: their neighbours and copies may be among them, as theirs may. Scores come to the driver: of the held-out
rows, some ten thousand pairs of numbers. Judges and warns; refuses nothing.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RATIOS = (0.1, 0.25, 0.5)
# Below this, half of the pool chosen by the proxy has hardly more of the true half than a random one (0.56 of it).
WORTHLESS = 0.2


def judge(ids: Sequence[str], scores: Sequence[float], predictions: Sequence[float]) -> dict[str, Any]:
    """The quality of predictions.

    Args:
        ids: of the rows, by which ties are broken as in a selection.
        scores: true ones.

    Returns:
        `n_rows`; `spearman`, null where either is the same for all rows, and `spearman_error`, its standard error where
        nothing is related; `top`: by alpha, `kept` of the true top alpha, and `chance`.
    """
    import numpy as np

    true, predicted = np.asarray(scores, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    names = np.asarray(ids)
    return {
        "n_rows": len(names),
        "spearman": spearman(true, predicted),
        "spearman_error": 1 / math.sqrt(max(1, len(names) - 1)),
        "top": {
            str(ratio): {"kept": _kept(names, true, predicted, ratio), "chance": ratio}
            for ratio in RATIOS
            if ratio * len(names) >= 1
        },
    }


def spearman(first: "np.ndarray", second: "np.ndarray") -> float | None:
    """The correlation of the ranks, ties at their mean rank; None where either has no order."""
    import numpy as np

    ranks = [_ranks(values) for values in (first, second)]
    if any(np.ptp(of) == 0 for of in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: "np.ndarray") -> "np.ndarray":
    import numpy as np

    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _kept(ids: "np.ndarray", true: "np.ndarray", predicted: "np.ndarray", ratio: float) -> float:
    """Of the true top, the share that is in the predicted top of as many rows."""
    import numpy as np

    n_top = math.floor(ratio * len(ids))
    tops = [set(np.lexsort((ids, -values))[:n_top].tolist()) for values in (true, predicted)]
    return len(tops[0] & tops[1]) / n_top


def warnings(quality: dict[str, Any]) -> list[str]:
    """What must be read before anything is chosen by these predictions."""
    rho, error = quality["spearman"], quality["spearman_error"]
    if rho is not None and rho >= max(WORTHLESS, 2 * error):
        return []
    found = "no order at all" if rho is None else f"Spearman {rho:.3f} (by chance 0 ± {error:.3f})"
    return [
        f"the proxy is worthless here: on {quality['n_rows']} held-out instances its predictions have {found} with the "
        "true score; what it would choose is hardly better than a random part: score the pool with the models"
    ]
