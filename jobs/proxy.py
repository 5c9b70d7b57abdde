"""`miniplm proxy`: a small regressor learns the score from what models have scored, and predicts it for all the pool.

Reads `score_matrix`, `instances` and the models' records; writes `proxy_scores` and `<root>/proxy/` (coefficients,
records, report.json). With `score.sample` below 1, models score a share of the pool and the proxy the whole pool; a
corpus with `candidates: proxy_scores` is chosen by its predictions. Off without the section `proxy`. A fitted proxy is
kept until its config or the models change, or --refit; a rerun predicts only new instances, and continues after a kill.
Driver only.

    miniplm proxy -c conf/demo.yaml proxy={} [--refit] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/proxy.py -c conf/demo.yaml
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage import Options
from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.proxy import fit, predict
from miniplm_udf.proxy.report import ProxyReport, report
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.proxy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxySummary(ProxyReport):
    """The result of `miniplm proxy`: the report about the proxy, and the seconds that the stage took."""

    seconds: float


def run(spark: "SparkSession", config: ExperimentConfig, options: Options | None = None) -> ProxySummary:
    """Fits the proxy and predicts the instances that have no prediction; returns the summary of the stage.

    A proxy with this config that exists is kept.

    Args:
        spark: the session.
        config: has the section `proxy`.
        options: the options of the command line; `refit` fits the proxy again to the instances scored so far.

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
    result = report(spark, config, record)
    LOGGER.info("%s", text(result))
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return ProxySummary(**fields, seconds=round(time.monotonic() - start, 3))


def text(result: ProxyReport) -> str:
    """Returns the proxy's report on one line.

    Args:
        result: the report.
    """
    heldout, rows, flops = result.heldout, result.rows, result.flops
    rho = "none" if heldout.spearman is None else f"{heldout.spearman:.3f}"
    tops = ", ".join(
        f"{top.kept:.3f} of the true top {ratio} (by chance {top.chance:g})" for ratio, top in heldout.top.items()
    )
    return (
        f"proxy: on {heldout.n_rows:,} held-out instances Spearman {rho}; it finds {tops}; "
        f"{rows.pool:,} instances predicted, {rows.scored:,} of them scored by models; "
        f"FLOPs a token: models {flops.models_per_token:.3g}, proxy {flops.proxy_per_token:.3g}; in all, "
        f"{flops.with_proxy:.3g} instead of {flops.models_on_pool:.3g} ({flops.share:.1%})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm proxy` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("proxy", argv)


if __name__ == "__main__":
    sys.exit(main())
