"""The cost of scoring with a proxy and without, in floating-point operations. Pure arithmetic.

    models:  2 P per token (`scoring.flops`; attention's own products are left out, which favours the models)
    proxy:   5 per distinct n-gram to predict (length 1: square, add, divide; then multiply, add)
             4 per distinct n-gram and pass to fit (prediction and gradient; one pass per iteration, and one before)

Finding and hashing words takes no floating-point operations, but most of a proxy's time, so the report also has
seconds.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from miniplm_udf.scoring.flops import forward_flops
from miniplm_udf.store.proxy_records import Solver

_PREDICT_FLOPS, _FIT_FLOPS = 5.0, 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCounts:
    """Floating-point operations of both ways to score the pool.

    Attributes:
        models_per_token: FLOPs of all models for one token.
        proxy_per_token: FLOPs of a prediction, per estimated token.
        models_on_pool: the whole pool scored by all models.
        models_on_scored: the sample that the models have scored.
        proxy_fit: fitting the proxy; `proxy_predict` is predicting the pool.
        with_proxy: the sum of the last three.
        share: `with_proxy` divided by `models_on_pool`.
    """

    models_per_token: float
    proxy_per_token: float
    models_on_pool: float
    models_on_scored: float
    proxy_fit: float
    proxy_predict: float
    with_proxy: float
    share: float


def flops(
    models: Sequence[tuple[int, int]], scored_bytes: int, pool: Mapping[str, int], solver: Solver,
    n_fitted: int,
) -> FlopCounts:  # fmt: skip
    """Returns the floating-point operations of scoring with the models and of using the proxy.

    Args:
        models: (parameters, scored tokens) of each model.
        scored_bytes: UTF-8 bytes of the scored texts.
        pool: `n_rows`, `n_bytes` and `estimated_tokens` of the whole pool.
        solver: the work of the fit.
        n_fitted: rows that the proxy was fitted on.
    """
    on_scored = sum(forward_flops(parameters, 0, 0, [n_tokens]) for parameters, n_tokens in models)
    on_pool = on_scored * pool["n_bytes"] / max(1, scored_bytes)
    predict = _PREDICT_FLOPS * solver["n_grams"] * pool["n_rows"]
    fit = _FIT_FLOPS * solver["n_grams"] * n_fitted * (solver["iterations"] + 1)
    with_proxy = on_scored + fit + predict
    return FlopCounts(
        models_per_token=sum(forward_flops(parameters, 0, 0, [1]) for parameters, _ in models),
        proxy_per_token=predict / max(1, pool["estimated_tokens"]),
        models_on_pool=on_pool,
        models_on_scored=on_scored,
        proxy_fit=fit,
        proxy_predict=predict,
        with_proxy=with_proxy,
        share=with_proxy / on_pool if on_pool else 0.0,
    )
