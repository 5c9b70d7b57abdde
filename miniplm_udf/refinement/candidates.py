"""Where a corpus's candidates come from: `score_matrix`, or `proxy_scores`, with the matrix beside. Driver only.

    root + corpus -> rows of the one table (left join the matrix, only where an expression names a column of it)

Of `proxy_scores` every instance of the pool may be kept, scored by models or not; a column of the matrix is null where
no model has scored. `as_of` gives the rows that a version was chosen from, by the micro-batches that it recorded: both
tables only ever gain rows. Which rows are kept is keep.py's; reads logs and a row, and writes nothing.
"""

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from miniplm_udf import proxy_records, schemas, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig
from miniplm_udf.errors import CorpusError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

MATRIX, PROXY = "score_matrix", "proxy_scores"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Rows to choose from.

    Attributes:
        rows: with `query_id` and `batch_id` of their own table.
        inputs: for the provenance: the tables' versions, and `last_batches`, the last batch of each of their queries.
    """

    rows: "DataFrame"
    inputs: dict[str, Any]


def read(
    spark: "SparkSession", config: ExperimentConfig, corpus: CorpusConfig, last_batches: dict[str, int] | None = None
) -> Candidates:
    """The rows of a resolved corpus's tables, as they are now or as they were at these micro-batches.

    Raises:
        CorpusError: a table is not there, or (now) lacks columns of the models.
    """
    matrix, matrix_version = _table(spark, config, MATRIX, last_batches)
    if not corpus.is_of_proxy:
        if last_batches is None:
            _check_columns(matrix, config)
        return Candidates(matrix, {"matrix_version": matrix_version, "last_batches": _last_batches(matrix)})
    predicted, version = _table(spark, config, PROXY, last_batches)
    rows = beside(predicted, matrix, str(corpus.where), str(corpus.score))
    inputs: dict[str, Any] = {"proxy_version": version, "last_batches": _last_batches(predicted)}
    if rows is not predicted:
        inputs["matrix_version"] = matrix_version
        inputs["last_batches"] |= _last_batches(matrix)
    return Candidates(rows, inputs)


def revisions(config: ExperimentConfig, corpus: CorpusConfig, rows: "DataFrame") -> dict[str, str]:
    """What made the rows of `read`: model revisions by alias, and `proxy`, that of the proxy that they are of."""
    if not corpus.is_of_proxy:
        # One query with one set of models wrote all rows of the matrix.
        found = rows.select(*(f"{alias}_revision" for alias in config.scored_aliases)).limit(1).collect()
        return dict(zip(config.scored_aliases, found[0], strict=True)) if found else {}
    of_proxy = [row[0] for row in rows.select("proxy_revision").limit(1).collect()]
    record = proxy_records.read(config.root, of_proxy[0]) if of_proxy else None
    models: dict[str, str] = record.identity["model_revisions"] if record else {}
    return {**models, "proxy": of_proxy[0]} if of_proxy else {}


def as_of(rows: "DataFrame", last_batches: dict[str, int]) -> "DataFrame":
    """The rows that a table had after the last micro-batch of each of its queries; none of another query."""
    known = [f"(query_id = '{query}' and batch_id <= {last})" for query, last in last_batches.items()]
    return rows.where(" or ".join(known) or "false")


def beside(predicted: "DataFrame", matrix: "DataFrame", *texts: str) -> "DataFrame":
    """Rows of `proxy_scores`; with the matrix's own columns, null where no model has scored, if a text names one."""
    own = [name for name in matrix.columns if name not in predicted.columns]
    if not any(re.search(rf"\b{name}\b", text) for name in own for text in texts):
        return predicted
    return predicted.join(matrix.select("instance_id", *own), "instance_id", "left")


def _table(
    spark: "SparkSession", config: ExperimentConfig, name: str, last_batches: dict[str, int] | None
) -> tuple["DataFrame", int | None]:
    uri = config.table_uri(name)
    version = tables.version(spark, uri)
    if version is None and name == PROXY:
        raise CorpusError("proxy_scores: expected the predictions of a proxy, found no table; run `miniplm proxy`")
    rows = tables.read(spark, uri, version)
    return rows if last_batches is None else as_of(rows, last_batches), version


def _check_columns(matrix: "DataFrame", config: ExperimentConfig) -> None:
    expected = schemas.score_matrix(config.scored_aliases).column_names
    if not set(expected) <= set(matrix.columns):
        raise CorpusError(
            f"score_matrix: expected columns of the models {config.scored_aliases}, missing "
            f"{sorted(set(expected) - set(matrix.columns))}; run `miniplm score` with this config first"
        )


def _last_batches(rows: "DataFrame") -> dict[str, int]:
    return {row[0]: row[1] for row in sorted(rows.groupBy("query_id").max("batch_id").collect())}
