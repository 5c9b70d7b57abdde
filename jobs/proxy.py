"""`miniplm proxy`: a small regressor learns the score from what models have scored, and predicts it for all the pool.

Reads `score_matrix`, `instances` and the models' records; writes `proxy_scores` and `<root>/proxy/` (coefficients,
records, report.json). With `score.sample` below 1, models score a share of the pool and the proxy the whole pool; a
corpus with `candidates: proxy_scores` is chosen by its predictions. Off without the section `proxy`. A fitted proxy is
kept until its config or the models change, or --refit; a rerun predicts only new instances, and continues after a kill.
Driver only.

    miniplm proxy -c conf/demo.yaml proxy={} [--refit] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/proxy.py -c conf/demo.yaml
"""

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from jobs.stages import Options
from jobs.text import plain
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.proxy import fit, predict
from miniplm_udf.proxy.report import report
from miniplm_udf.storage import Json
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.proxy")


def run(spark: "SparkSession", config: ExperimentConfig, options: Options | None = None) -> Json:
    """Fits the proxy, unless one of this config exists, and predicts the instances that have no prediction yet.

    Args:
        spark: the session.
        config: has the section `proxy`.
        options: the options of the command line; `refit` fits the proxy again to the instances scored so far.

    Returns:
        The report of `proxy.report.report` as plain data, and `seconds`.

    Raises:
        ConfigError: the config has no section `proxy`, or its score is wrong.
        CorpusError: too few instances are scored, or none.
    """
    if config.proxy is None:
        raise ConfigError("proxy: expected the section of a proxy, found none (`proxy: {}` takes the defaults)")
    start = time.monotonic()
    record = fit.current_proxy(spark, config, options is not None and options.refit)
    for warning in record.warnings:
        LOGGER.warning("%s", warning)
    QueryRunner(spark, config.root, config.stream).run([predict.PredictionQuery(spark, config, record)])
    summary: Json = plain(report(spark, config, record))
    LOGGER.info("%s", text(summary))
    return {**summary, "seconds": round(time.monotonic() - start, 3)}


def text(summary: Json) -> str:
    """Returns the proxy's report on one line.

    Args:
        summary: the summary of the stage, as plain data.
    """
    heldout, flops = summary["heldout"], summary["flops"]
    rho = "none" if heldout["spearman"] is None else f"{heldout['spearman']:.3f}"
    tops = ", ".join(
        f"{top['kept']:.3f} of the true top {ratio} (by chance {top['chance']:g})"
        for ratio, top in heldout["top"].items()
    )
    return (
        f"proxy: on {heldout['n_rows']:,} held-out instances Spearman {rho}; it finds {tops}; "
        f"{summary['rows']['pool']:,} instances predicted, {summary['rows']['scored']:,} of them scored by models; "
        f"FLOPs a token: models {flops['models_per_token']:.3g}, proxy {flops['proxy_per_token']:.3g}; in all, "
        f"{flops['with_proxy']:.3g} instead of {flops['models_on_pool']:.3g} ({flops['share']:.1%})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm proxy` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("proxy", argv)


if __name__ == "__main__":
    sys.exit(main())
