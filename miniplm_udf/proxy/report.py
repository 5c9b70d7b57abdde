"""What is said of a proxy: how good it is on held-out rows, and what scoring costs with it and without. Driver only.

Inputs: the record of the proxy, `score_matrix`, `proxy_scores`, the models' records. Output: plain data, also written
to `<root>/proxy/report.json`. Sums over narrow columns; no text is read. A retry replaces the file.
"""

from typing import TYPE_CHECKING, Any

from miniplm_udf import proxy_records, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.model_records import read_record
from miniplm_udf.proxy.costs import flops
from miniplm_udf.proxy_records import ProxyRecord

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def report(spark: "SparkSession", config: ExperimentConfig, record: ProxyRecord) -> dict[str, Any]:
    """The report, of the tables as they are now.

    Returns:
        `revision`, `path` of the coefficients; `fitted_on`, `heldout` (`quality.judge`), `rows` of the pool and how
        many of them models have scored, `flops` (`costs.flops`), `fit_seconds`, `warnings`.
    """
    aliases = config.scored_aliases
    pool = _sums(spark, config, "proxy_scores", ["n_bytes", "estimated_tokens"])
    scored = _sums(spark, config, "score_matrix", ["n_bytes", *(f"{alias}_n_tokens" for alias in aliases)])
    models = [(read_record(config, alias).n_parameters, scored[f"{alias}_n_tokens"]) for alias in aliases]
    found = {
        "revision": record.revision,
        "path": storage.redact(proxy_records.model_uri(config.root, record.revision)),
        "fitted_on": record.fitted_on,
        "heldout": record.quality,
        "rows": {"pool": pool["n_rows"], "scored": scored["n_rows"]},
        "flops": flops(models, scored["n_bytes"], pool, record.solver, record.fitted_on["n_fitted"]),
        "fit_seconds": record.solver["seconds"],
        "warnings": record.warnings,
    }
    storage.write_json(proxy_records.report_uri(config.root), found)
    return found


def _sums(spark: "SparkSession", config: ExperimentConfig, table: str, columns: list[str]) -> dict[str, int]:
    """Sums of columns over a table's rows of the pool, and their number, `n_rows`."""
    from pyspark.sql import functions as F

    rows = tables.read(spark, config.table_uri(table)).where("split = 'pool'")
    sums = [F.coalesce(F.sum(column), F.lit(0)).alias(column) for column in columns]
    return dict(rows.agg(F.count("*").alias("n_rows"), *sums).collect()[0].asDict())
