"""The report about a proxy: its quality on held-out rows, and what scoring costs with it and without. Driver only.

Inputs: the record of the proxy, `score_matrix`, `proxy_scores`, the models' records. Output: a `ProxyReport`, which is
also written to `<root>/proxy/report.json`. Adds up narrow columns; reads no text. A retry replaces the file.
"""

import dataclasses
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.proxy.costs import FlopCounts, flops
from miniplm_udf.scores.models import read_record
from miniplm_udf.store import proxy_records, tables
from miniplm_udf.store.proxy_records import FittedRows, ProxyRecord, Quality

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRows:
    """Rows of the pool, and how many of them models have scored."""

    pool: int
    scored: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyReport:
    """The report about a proxy.

    Attributes:
        revision: of the proxy.
        path: of its coefficients.
        fitted_on: the rows that it was fitted on (`ProxyRecord.fitted_on`).
        heldout: its quality on held-out rows, from the record.
        rows: of the pool.
        flops: costs with the proxy and without.
        fit_seconds: how long the fit took.
        warnings: sentences to read before a corpus is chosen by it.
    """

    revision: str
    path: str
    fitted_on: FittedRows
    heldout: Quality
    rows: PoolRows
    flops: FlopCounts
    fit_seconds: float
    warnings: list[str]


def report(spark: "SparkSession", config: ExperimentConfig, record: ProxyRecord) -> ProxyReport:
    """Writes the report from the tables as they are now, and returns it.

    Args:
        spark: any session.
        config: the experiment.
        record: of the proxy.
    """
    aliases = config.scored_aliases
    pool = _sums(spark, config, "proxy_scores", ["n_bytes", "estimated_tokens"])
    scored = _sums(spark, config, "score_matrix", ["n_bytes", *(f"{alias}_n_tokens" for alias in aliases)])
    models = [(read_record(config, alias).n_parameters, scored[f"{alias}_n_tokens"]) for alias in aliases]
    result = ProxyReport(
        revision=record.revision,
        path=storage.redact(proxy_records.model_uri(config.root, record.revision)),
        fitted_on=record.fitted_on,
        heldout=record.quality,
        rows=PoolRows(pool=pool["n_rows"], scored=scored["n_rows"]),
        flops=flops(models, scored["n_bytes"], pool, record.solver, record.fitted_on["n_fitted"]),
        fit_seconds=record.solver["seconds"],
        warnings=record.warnings,
    )
    storage.write_json(proxy_records.report_uri(config.root), dataclasses.asdict(result))
    return result


def _sums(spark: "SparkSession", config: ExperimentConfig, table: str, columns: list[str]) -> dict[str, int]:
    """Sums of columns over the pool rows of a table, by name; and `n_rows`, their number."""
    from pyspark.sql import functions as F

    rows = tables.read(spark, config.layout.table(table)).where("split = 'pool'")
    sums = [F.coalesce(F.sum(column), F.lit(0)).alias(column) for column in columns]
    return dict(rows.agg(F.count("*").alias("n_rows"), *sums).collect()[0].asDict())
