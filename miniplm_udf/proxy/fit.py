"""Fitting the proxy: scored rows of the matrix with their texts -> coefficients, judged on held-out rows.

    score_matrix (pool, at least 32 tokens) -> drawn by hash -> features -> ridge regression -> <root>/proxy/<revision>

Owns which rows are drawn and which are held out, the regression (Spark ML's L-BFGS, from zero) and its record. The rows
are in one partition, sorted by id, so their sums have one order, and the same rows give the same coefficients on the
same kind of machine. A fitted proxy stays in use until the config or the models change, or the user asks for a new one;
otherwise a growing matrix would change every prediction. A fit is identified by its inputs and is not repeated; a retry
after a kill fits again. Driver only, under the proxy's lease; the JVM does the work.
"""

import logging
import time
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.config.rules import plain_score, uniform
from miniplm_udf.errors import CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.proxy import features, quality
from miniplm_udf.refinement import candidates, expressions, fingerprints, refine
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.store import proxy_records, tables
from miniplm_udf.store.provenance import VersionTables
from miniplm_udf.store.proxy_records import FittedRows, ProxyRecord, ProxySettings

if TYPE_CHECKING:
    from pyspark.ml.regression import LinearRegressionModel
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.proxy")

# Weight of the penalty, in rows. Vectors have length 1, so this is the ratio of the score's variance that the text does
# not explain to the variance that it explains: right if it explains a quarter, and little worse around that.
_RIDGE = 3.0
_MAX_ITERATIONS = 100
_MIN_ROWS = 20


def current_proxy(spark: "SparkSession", config: ExperimentConfig, refit: bool = False) -> ProxyRecord:
    """Returns the proxy in use, or fits one if it is not of this config and these models.

    Args:
        spark: any session.
        config: the experiment, with a section `proxy`.
        refit: fit the proxy again, to the rows that are scored by now.

    Returns:
        The record of the proxy, which is in use now.

    Raises:
        ConfigError: `proxy.score` is no SQL over the matrix.
        CorpusError: there is no matrix, or it has too few rows.
    """
    with Lease(config.layout.lease("proxy"), "proxy", waits=True):
        corpus = CorpusConfig()
        scored = candidates.read_candidates(spark, config, corpus)
        identity = _identity(config, candidates.revisions(config, corpus, scored.rows))
        in_use = proxy_records.read(config.root)
        if in_use and in_use.identity == identity and not refit and _has_model(config, in_use):
            return in_use
        drawn = _drawn(config, scored.rows, identity).persist()
        try:
            fitted_on = _description(drawn, scored.inputs)
            revision = fingerprint(identity, fitted_on["fingerprint"])
            # The same rows give the same proxy: it is not fitted again, and its predictions stay.
            record = proxy_records.read(config.root, revision)
            if record is None or not _has_model(config, record):
                record = _fit(spark, config, drawn, revision, identity, fitted_on)
        finally:
            drawn.unpersist()
        proxy_records.write(config.root, record)
        return record


def _has_model(config: ExperimentConfig, record: ProxyRecord) -> bool:
    """Whether the coefficients exist; if they are gone, the proxy is fitted again."""
    return storage.exists(proxy_records.model_uri(config.root, record.revision))


def _identity(config: ExperimentConfig, revisions: dict[str, str]) -> ProxySettings:
    """Everything but the rows that a fit depends on (`ProxyRecord.identity`)."""
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


def _drawn(config: ExperimentConfig, matrix: "DataFrame", identity: ProxySettings) -> "DataFrame":
    """instance_id, source, score, n_tokens, n_bytes, is_heldout of the drawn rows, and `n_scored`, the same in each."""
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


def _description(drawn: "DataFrame", inputs: VersionTables) -> FittedRows:
    """The record of the drawn rows (`ProxyRecord.fitted_on`).

    Raises:
        CorpusError: there are too few rows, or all have the same score.
    """
    from pyspark.sql import functions as F

    sums = drawn.agg(
        *fingerprints.sums_of(F.lit(True)),
        F.count_if("is_heldout").alias("n_heldout"),
        F.count_distinct("score").alias("n_scores"),
        F.max("n_scored").alias("n_scored"),
    ).collect()[0]
    n_heldout, n_fitted = int(sums["n_heldout"]), int(sums["n_kept"] - sums["n_heldout"])
    if min(n_heldout, n_fitted) < _MIN_ROWS or sums["n_scores"] < 2:
        raise CorpusError(
            f"proxy: expected at least {_MIN_ROWS} scored instances to fit on and {_MIN_ROWS} held-out ones, with "
            f"different scores, found {n_fitted} and {n_heldout} with {sums['n_scores']} scores; score more "
            "(score.sample), or draw more (proxy.rows, proxy.heldout)"
        )
    digest = fingerprints.fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], int(sums["n_kept"]))
    return {
        **inputs,
        "n_scored": int(sums["n_scored"]),
        "n_fitted": n_fitted,
        "n_heldout": n_heldout,
        "fingerprint": digest,
    }


def _fit(
    spark: "SparkSession", config: ExperimentConfig, drawn: "DataFrame", revision: str, identity: ProxySettings,
    fitted_on: FittedRows,
) -> ProxyRecord:  # fmt: skip
    from pyspark import StorageLevel

    LOGGER.info("proxy: fitting on %d instances, with %d held out", fitted_on["n_fitted"], fitted_on["n_heldout"])
    start = time.monotonic()
    rows = _with_features(spark, config, drawn).persist(StorageLevel.DISK_ONLY)
    try:
        model, iterations, n_grams = _solve(rows.where("not is_heldout"), fitted_on["n_fitted"])
        predicted = model.transform(rows.where("is_heldout")).select("instance_id", "score", "prediction").toArrow()
        model.write().overwrite().save(proxy_records.model_uri(config.root, revision))
    finally:
        rows.unpersist()
    heldout = quality.judge(*(predicted.column(name).to_pylist() for name in ("instance_id", "score", "prediction")))
    overall, by_source = _tokens_per_byte(drawn)
    return ProxyRecord(
        revision=revision,
        identity=identity,
        fitted_on=fitted_on,
        tokens_per_byte=overall,
        tokens_per_byte_of=by_source,
        quality=heldout,
        solver={"iterations": iterations, "n_grams": n_grams, "seconds": round(time.monotonic() - start, 3)},
        warnings=quality.warnings(heldout),
        code_revision=code_revision(),
    )


def _with_features(spark: "SparkSession", config: ExperimentConfig, drawn: "DataFrame") -> "DataFrame":
    """The rows with their features, in one partition, sorted by id."""
    from pyspark.sql import functions as F

    assert config.proxy is not None
    texts = tables.read(spark, config.layout.table("instances")).where("split = 'pool'").select("instance_id", "text")
    # The drawn rows, which are narrow, are broadcast, so the texts are not shuffled.
    rows = texts.join(F.broadcast(drawn), "instance_id")
    described = features.with_features(rows, config.proxy.features)
    return described.repartition(1).sortWithinPartitions("instance_id")


def _solve(rows: "DataFrame", n_rows: int) -> tuple["LinearRegressionModel", int, float]:
    """The fitted model, the number of iterations, and the mean number of distinct n-grams per row."""
    from pyspark.ml.regression import LinearRegression
    from pyspark.sql import functions as F

    spread, n_grams = rows.agg(F.stddev_samp("score"), F.avg("n_grams")).collect()[0]
    solver = LinearRegression(
        featuresCol="features",
        labelCol="score",
        solver="l-bfgs",
        maxIter=_MAX_ITERATIONS,
        # In the score's unit, as Spark expects. Features are not standardised: a word that occurs in one text would
        # otherwise weigh as much as a common one.
        regParam=_RIDGE * spread / n_rows,
        standardization=False,
    )
    model = solver.fit(rows)
    iterations = int(model.summary.totalIterations)
    if iterations >= _MAX_ITERATIONS:
        LOGGER.info("proxy: the fit stopped after %d iterations, which is the limit", iterations)
    return model, iterations, float(n_grams)


def _tokens_per_byte(drawn: "DataFrame") -> tuple[float, dict[str, float]]:
    """Tokens per UTF-8 byte over all rows, and by source."""
    from pyspark.sql import functions as F

    sums = drawn.groupBy("source").agg(F.sum("n_tokens").alias("tokens"), F.sum("n_bytes").alias("bytes")).collect()
    by_source = {row["source"]: row["tokens"] / row["bytes"] for row in sums}
    return sum(row["tokens"] for row in sums) / sum(row["bytes"] for row in sums), by_source
