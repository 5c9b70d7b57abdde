"""The candidates of a corpus: rows of `score_matrix`, or of `proxy_scores` with columns of the matrix. Driver only.

    root + corpus -> rows of the table (left join of the matrix, only if an expression names one of its columns)

If the corpus takes `proxy_scores`, every instance of the pool may be kept, whether models have scored it or not; the
columns of the matrix are null where no model has. `as_of` gives the rows that a version was chosen from, by the
micro-batches that the version recorded: both tables only gain rows. keep.py decides which rows are kept. Reads the logs
and one row; writes nothing.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.store import delta_log, proxy_records, tables
from miniplm_udf.store.provenance import VersionTables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

MATRIX, PROXY = "score_matrix", "proxy_scores"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Rows to choose from.

    Attributes:
        rows: a frame with `query_id` and `batch_id` of its own table.
        inputs: versions of the tables and their newest micro-batches, for the provenance.
    """

    rows: "DataFrame"
    inputs: VersionTables


def read_candidates(
    spark: "SparkSession", config: ExperimentConfig, corpus: CorpusConfig, last_batches: dict[str, int] | None = None
) -> Candidates:
    """Reads the tables that a corpus selects from, as they are now or as they were.

    Args:
        spark: any session.
        config: the experiment.
        corpus: its resolved config.
        last_batches: newest micro-batch by query id, of the state to read; None reads the present state.

    Returns:
        The rows, and the versions of the tables that they come from.

    Raises:
        CorpusError: a table does not exist, or the present matrix lacks columns of the models.
    """
    matrix, matrix_version = _table(spark, config, MATRIX, last_batches)
    if not corpus.is_of_proxy:
        if last_batches is None:
            _check_columns(matrix, config)
        return Candidates(matrix, {"matrix_version": matrix_version, "last_batches": _last_batches(matrix)})
    predicted, version = _table(spark, config, PROXY, last_batches)
    rows = with_matrix(predicted, matrix, str(corpus.where), str(corpus.score))
    inputs: VersionTables = {"proxy_version": version, "last_batches": _last_batches(predicted)}
    if rows is not predicted:
        inputs["matrix_version"] = matrix_version
        inputs["last_batches"] |= _last_batches(matrix)
    return Candidates(rows, inputs)


def revisions(config: ExperimentConfig, corpus: CorpusConfig, rows: "DataFrame") -> dict[str, str]:
    """The revisions of the models that made the candidates.

    Args:
        config: the experiment.
        corpus: its resolved config.
        rows: rows of `read_candidates`.

    Returns:
        Revisions by alias, and the revision of the proxy under `proxy`; empty if there are no rows.

    Raises:
        CorpusError: the proxy's record is gone.
    """
    if not corpus.is_of_proxy:
        # One query with one set of models wrote all rows of the matrix.
        first_row = rows.select(*(f"{alias}_revision" for alias in config.scored_aliases)).limit(1).collect()
        return dict(zip(config.scored_aliases, first_row[0], strict=True)) if first_row else {}
    first_row = rows.select("proxy_revision").limit(1).collect()
    if not first_row:
        return {}
    proxy_revision = first_row[0][0]
    record = proxy_records.read(config.root, proxy_revision)
    if record is None:
        raise CorpusError(
            f"proxy_scores: expected the record of the proxy {proxy_revision} in "
            f"{storage.redact(config.layout.proxy())}, found none; put it back from a copy, or run `miniplm proxy`, "
            "which fits the proxy again"
        )
    return {**record.identity["model_revisions"], "proxy": proxy_revision}


def as_of(rows: "DataFrame", last_batches: dict[str, int]) -> "DataFrame":
    """Returns the rows that a table had after certain micro-batches of its queries.

    Args:
        rows: a frame with `query_id` and `batch_id`.
        last_batches: the last micro-batch whose rows are returned, by query id. Rows of other queries are left out.
    """
    conditions = [f"(query_id = '{query}' and batch_id <= {last})" for query, last in last_batches.items()]
    return rows.where(" or ".join(conditions) or "false")


def with_matrix(predicted: "DataFrame", matrix: "DataFrame", *expressions: str) -> "DataFrame":
    """Adds the matrix's own columns to rows of `proxy_scores`, if an expression names one of them.

    Args:
        predicted: rows of `proxy_scores`.
        matrix: rows of `score_matrix`.
        expressions: SQL texts.

    Returns:
        The rows of `predicted`; added columns are null where no model has scored.
    """
    own = [name for name in matrix.columns if name not in predicted.columns]
    if not any(re.search(rf"\b{name}\b", text) for name in own for text in expressions):
        return predicted
    return predicted.join(matrix.select("instance_id", *own), "instance_id", "left")


def _table(
    spark: "SparkSession", config: ExperimentConfig, name: str, last_batches: dict[str, int] | None
) -> tuple["DataFrame", int | None]:
    uri = config.layout.table(name)
    version = delta_log.newest_version(uri)
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
