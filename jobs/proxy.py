"""`miniplm proxy`: a small regressor learns the score from what models have scored, and predicts it for all the pool.

Reads `score_matrix`, `instances` and the models' records; writes `proxy_scores` and `<root>/proxy/` (coefficients,
records, report.json). With `score.sample` below 1, models score a share of the pool and the proxy all of it; a corpus
with `candidates: proxy_scores` is chosen by its predictions. Off without the section `proxy`. A proxy that is fitted
stays until its config or the models change, or --refit; a rerun predicts what is new, and goes on after a kill.

    miniplm proxy -c conf/demo.yaml proxy={} [--refit] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/proxy.py -c conf/demo.yaml
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import records
from jobs.session import guarded, make_session, stage_parser
from miniplm_udf.config import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.proxy import fit, predict
from miniplm_udf.proxy.report import report
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.proxy")


def run(spark: "SparkSession", config: ExperimentConfig, refit: bool = False) -> dict[str, Any]:
    """Fits the proxy where there is none of this config, and predicts what has no prediction yet.

    Args:
        refit: whether to fit it anew, to what is scored by now.

    Returns:
        `proxy.report.report`, and seconds.

    Raises:
        ConfigError: the config has no section `proxy`, or its score is wrong.
        CorpusError: too little is scored, or nothing.
    """
    if config.proxy is None:
        raise ConfigError("proxy: expected the section of a proxy, found none (`proxy: {}` takes the defaults)")
    start = time.monotonic()
    record = fit.current(spark, config, refit)
    for warning in record.warnings:
        LOGGER.warning("%s", warning)
    QueryRunner(spark, config.root, config.stream).run([predict.prediction_query(spark, config, record)])
    found = report(spark, config, record)
    LOGGER.info("%s", text(found))
    return {**found, "seconds": round(time.monotonic() - start, 3)}


def text(found: dict[str, Any]) -> str:
    """The report in a line."""
    heldout, flops = found["heldout"], found["flops"]
    rho = "none" if heldout["spearman"] is None else f"{heldout['spearman']:.3f}"
    tops = ", ".join(
        f"{of['kept']:.3f} of the true top {ratio} (by chance {of['chance']:g})" for ratio, of in heldout["top"].items()
    )
    return (
        f"proxy: on {heldout['n_rows']:,} held-out instances Spearman {rho}; it finds {tops}; "
        f"{found['rows']['pool']:,} instances predicted, {found['rows']['scored']:,} of them scored by models; FLOPs a "
        f"token: models {flops['models_per_token']:.3g}, proxy {flops['proxy_per_token']:.3g}; in all, "
        f"{flops['with_proxy']:.3g} instead of {flops['models_on_pool']:.3g} ({flops['share']:.1%})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = stage_parser("proxy", __doc__)
    parser.add_argument("--refit", action="store_true", help="fit it anew, to what is scored by now")

    def body() -> int:
        arguments = parser.parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(json.dumps(printable(to_dict(config)), indent=2))
            return EXIT_DONE
        session = make_session(config, "miniplm proxy")
        try:
            summary = records.execute("proxy", lambda spark, used: run(spark, used, arguments.refit), session, config)
        finally:
            session.stop()
        print(json.dumps({"proxy": summary}, indent=2, default=str))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
