"""What scoring costs with a proxy and without, in floating-point operations. Pure arithmetic.

    models:  2 P a token (`scoring.flops`, attention's own products left out: in the models' favour)
    proxy:   5 a different n-gram to predict (length 1: square, add, divide; then multiply, add)
             4 a different n-gram and pass to fit (prediction and gradient; a pass an iteration, and one before)

Finding and hashing words is no floating-point work, and is most of a proxy's time: seconds stand beside these counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from miniplm_udf.scoring.flops import forward_flops

_PREDICT_FLOPS, _FIT_FLOPS = 5.0, 4.0


def flops(
    models: Sequence[tuple[int, int]], scored_bytes: int, pool: Mapping[str, int], solver: Mapping[str, Any],
    n_fitted: int,
) -> dict[str, float]:  # fmt: skip
    """Operations of both ways.

    Args:
        models: parameters of each, and tokens that it has scored.
        scored_bytes: of the text that they have scored.
        pool: `n_rows`, `n_bytes` and `estimated_tokens` of all that is to be scored.
        solver: `n_grams` of an instance, `iterations` of the fit.
        n_fitted: rows of it.

    Returns:
        `models_per_token`, `proxy_per_token`; `models_on_pool`, the whole pool scored by all models;
        `models_on_scored`, `proxy_fit`, `proxy_predict`, and their sum `with_proxy`; `share`, of that in
        `models_on_pool`.
    """
    on_scored = sum(forward_flops(parameters, 0, 0, [n_tokens]) for parameters, n_tokens in models)
    on_pool = on_scored * pool["n_bytes"] / max(1, scored_bytes)
    predict = _PREDICT_FLOPS * solver["n_grams"] * pool["n_rows"]
    fit = _FIT_FLOPS * solver["n_grams"] * n_fitted * (solver["iterations"] + 1)
    with_proxy = on_scored + fit + predict
    return {
        "models_per_token": sum(forward_flops(parameters, 0, 0, [1]) for parameters, _ in models),
        "proxy_per_token": predict / max(1, pool["estimated_tokens"]),
        "models_on_pool": on_pool,
        "models_on_scored": on_scored,
        "proxy_fit": fit,
        "proxy_predict": predict,
        "with_proxy": with_proxy,
        "share": with_proxy / on_pool if on_pool else 0.0,
    }
