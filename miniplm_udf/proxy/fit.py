"""Fitting the proxy: scored rows of the matrix with their text -> coefficients, tried on rows that were held out.

    score_matrix (pool, at least 32 tokens) -> drawn by hash -> features -> ridge regression -> <root>/proxy/<revision>

Owns which rows are drawn and which are held out, the regression (Spark ML's, by L-BFGS, from zero) and what is recorded
of it. One partition in the order of the ids is summed up in that order, so that the same rows give the same
coefficients on the same kind of machine. What was fitted stays in use until the config or the models change, or it is
asked for: a matrix that grows would else move every prediction. A fit is found by its inputs and never made twice; a
retry after a kill makes it again. Driver only, under the proxy's lease; the work is the JVM's.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from miniplm_udf import proxy_records, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.proxy import features, quality
from miniplm_udf.proxy_records import ProxyRecord
from miniplm_udf.refinement import candidates, expressions, refine
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.rules import plain_score, uniform
from miniplm_udf.streams.lease import Lease, lease_uri

if TYPE_CHECKING:
    from pyspark.ml.regression import LinearRegressionModel
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.proxy")

# Weight of the penalty, in rows. Vectors have length 1, so with the score's variance as unit this is the ratio of what
# the text does not tell of the score to what it tells: right where a quarter is told, and little worse around that.
_RIDGE = 3.0
_PASSES = 100
_FEW = 20


def current(spark: "SparkSession", config: ExperimentConfig, refit: bool = False) -> ProxyRecord:
    """The proxy of this config: the one in use, or one that is fitted now.

    Args:
        refit: whether to fit it to what is scored by now.

    Raises:
        ConfigError: `proxy.score` is no SQL over the matrix.
        CorpusError: there is no matrix, or too little in it.
    """
    with Lease(lease_uri(config.root, "proxy"), "proxy", waits=True):
        plain = CorpusConfig()
        scored = candidates.read(spark, config, plain)
        identity = _identity(config, candidates.revisions(config, plain, scored.rows))
        known = proxy_records.read(config.root)
        if known and known.identity == identity and not refit:
            return known
        drawn = _drawn(config, scored.rows, identity).persist()
        try:
            fitted_on = _described(drawn, scored.inputs)
            revision = fingerprint(identity, fitted_on["fingerprint"])
            # Of the same rows, the same proxy: nothing to do, and its predictions stay.
            record = proxy_records.read(config.root, revision)
            if record is None:
                record = _fit(spark, config, drawn, revision, identity, fitted_on)
        finally:
            drawn.unpersist()
        proxy_records.write(config.root, record)
        return record


def _identity(config: ExperimentConfig, revisions: dict[str, str]) -> dict[str, Any]:
    assert config.proxy is not None
    tokens = refine.tokens_column(config, CorpusConfig())
    return {
        "score": plain_score(CorpusConfig(score=config.proxy.score)),
        "where": f"{tokens} >= {refine.MIN_TOKENS}",
        "tokens_of": config.refine.tokens_of,
        "rows": config.proxy.rows,
        "heldout": config.proxy.heldout,
        "features": config.proxy.features,
        "n_grams": features.VERSION,
        "ridge": _RIDGE,
        "model_revisions": revisions,
    }


def _drawn(config: ExperimentConfig, matrix: "DataFrame", identity: dict[str, Any]) -> "DataFrame":
    """instance_id, source, score, n_tokens, n_bytes, is_heldout of the rows to fit and to try on, and `n_scored`."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import NumericType

    place, text = "proxy.score", identity["score"]
    score = expressions.expression(matrix, text, place, NumericType, "a number")
    refine.check_tokenizers(config, place, text)
    usable = (
        matrix.where("split = 'pool'")
        .where(identity["where"])
        .withColumns({"score": score.cast("double"), "n_tokens": F.col(f"{identity['tokens_of']}_n_tokens")})
        .where(is_finite())
    )
    n_scored = usable.count()
    share = min(1.0, identity["rows"] / max(1, n_scored))
    return usable.where(f"{uniform(0, 'proxy.rows')} <= {share!r}D").select(
        "instance_id", "source", "score", "n_tokens", "n_bytes",
        F.expr(f"{uniform(0, 'proxy.heldout')} < {identity['heldout']!r}D").alias("is_heldout"),
        F.lit(n_scored).alias("n_scored"),
    )  # fmt: skip


def _described(drawn: "DataFrame", inputs: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the rows.

    Raises:
        CorpusError: they are too few, or all of one score.
    """
    from pyspark.sql import functions as F

    sums = drawn.agg(
        *refine.sums_of(F.lit(True)),
        F.count_if("is_heldout").alias("n_heldout"),
        F.count_distinct("score").alias("n_scores"),
        F.max("n_scored").alias("n_scored"),
    ).collect()[0]
    n_heldout, n_fitted = int(sums["n_heldout"]), int(sums["n_kept"] - sums["n_heldout"])
    if min(n_heldout, n_fitted) < _FEW or sums["n_scores"] < 2:
        raise CorpusError(
            f"proxy: expected at least {_FEW} scored instances to fit on and {_FEW} to try on, of different scores, "
            f"found {n_fitted} and {n_heldout} with {sums['n_scores']} scores; score more (score.sample), or draw more "
            "(proxy.rows, proxy.heldout)"
        )
    found = refine.fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], int(sums["n_kept"]))
    counts = {"n_scored": int(sums["n_scored"]), "n_fitted": n_fitted, "n_heldout": n_heldout}
    return {**inputs, **counts, "fingerprint": found}


def _fit(
    spark: "SparkSession", config: ExperimentConfig, drawn: "DataFrame", revision: str, identity: dict[str, Any],
    fitted_on: dict[str, Any],
) -> ProxyRecord:  # fmt: skip
    from pyspark import StorageLevel

    LOGGER.info("proxy: fitting on %d instances, trying on %d", fitted_on["n_fitted"], fitted_on["n_heldout"])
    start = time.monotonic()
    rows = _with_features(spark, config, drawn).persist(StorageLevel.DISK_ONLY)
    try:
        model, solver = _solve(rows.where("not is_heldout"), fitted_on["n_fitted"])
        tried = model.transform(rows.where("is_heldout")).select("instance_id", "score", "prediction").toArrow()
        model.write().overwrite().save(proxy_records.model_uri(config.root, revision))
    finally:
        rows.unpersist()
    judged = quality.judge(*(tried.column(name).to_pylist() for name in ("instance_id", "score", "prediction")))
    overall, by_source = _tokens_per_byte(drawn)
    return ProxyRecord(
        revision=revision,
        identity=identity,
        fitted_on=fitted_on,
        tokens_per_byte=overall,
        tokens_per_byte_of=by_source,
        quality=judged,
        solver={**solver, "seconds": round(time.monotonic() - start, 3)},
        warnings=quality.warnings(judged),
        code_revision=code_revision(),
    )


def _with_features(spark: "SparkSession", config: ExperimentConfig, drawn: "DataFrame") -> "DataFrame":
    """The rows with their features, in one partition, by id."""
    from pyspark.sql import functions as F

    assert config.proxy is not None
    texts = tables.read(spark, config.table_uri("instances")).where("split = 'pool'").select("instance_id", "text")
    # The narrow side goes to the texts: they do not move.
    rows = texts.join(F.broadcast(drawn), "instance_id")
    made = features.with_features(rows, config.proxy.features)
    return made.repartition(1).sortWithinPartitions("instance_id")


def _solve(rows: "DataFrame", n_rows: int) -> tuple["LinearRegressionModel", dict[str, Any]]:
    from pyspark.ml.regression import LinearRegression
    from pyspark.sql import functions as F

    spread, n_grams = rows.agg(F.stddev_samp("score"), F.avg("n_grams")).collect()[0]
    solver = LinearRegression(
        featuresCol="features",
        labelCol="score",
        solver="l-bfgs",
        maxIter=_PASSES,
        # Spark takes it in the score's unit. Not per standardised feature: a word of one text would weigh as a common
        # one then.
        regParam=_RIDGE * spread / n_rows,
        standardization=False,
    )
    model = solver.fit(rows)
    iterations = int(model.summary.totalIterations)
    if iterations >= _PASSES:
        LOGGER.info("proxy: the fit was ended after %d iterations", iterations)
    return model, {"iterations": iterations, "n_grams": float(n_grams)}


def _tokens_per_byte(drawn: "DataFrame") -> tuple[float, dict[str, float]]:
    """Over all, and by source."""
    from pyspark.sql import functions as F

    sums = drawn.groupBy("source").agg(F.sum("n_tokens").alias("tokens"), F.sum("n_bytes").alias("bytes")).collect()
    by_source = {row["source"]: row["tokens"] / row["bytes"] for row in sums}
    return sum(row["tokens"] for row in sums) / sum(row["bytes"] for row in sums), by_source
