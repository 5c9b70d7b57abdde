"""The rows that expressions are evaluated over: candidates, joined with other tables whose columns they name.

    score_matrix (+ instances) (+ annotations) -> pool rows with the columns that `score` and `where` name

A table is joined only if an expression needs its columns, so a refinement pays for what it names. Every instance
must be annotated before an expression may name an annotation: without a value it would pass or fail by accident. Runs
one job, which counts instances without annotations. Driver only; writes nothing.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.refinement import expressions
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.store.provenance import VersionTables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

INSTANCES_VERSION, ANNOTATIONS_VERSION = "instances_version", "annotations_version"


def with_instances(
    spark: "SparkSession", config: ExperimentConfig, matrix: "DataFrame", *texts: str
) -> tuple["DataFrame", VersionTables]:
    """Joins `instances` and `annotations` to the candidates, as far as the expressions name their columns.

    Args:
        spark: any session.
        config: the experiment.
        matrix: rows of `candidates.read_candidates`.
        texts: the expressions.

    Returns:
        The rows; and, for the provenance, the versions of the tables that were joined (`instances_version`,
        `annotations_version`) and the settings of the annotations (`annotated_by`).

    Raises:
        CorpusError: a named column of `annotations` does not exist, or some rows have no annotations.
    """
    if expressions.resolves(matrix, *texts):
        return matrix, {}
    others = _other_tables(spark, config)
    # Join one table if that is enough; otherwise both, so that an error lists all columns.
    for names in ([INSTANCES_VERSION], [ANNOTATIONS_VERSION], list(others)):
        if set(names) <= others.keys():
            rows = expressions.joined(matrix, *(others[name][0] for name in names))
            if expressions.resolves(rows, *texts):
                inputs = VersionTables()
                if INSTANCES_VERSION in names:
                    inputs["instances_version"] = others[INSTANCES_VERSION][1]
                if ANNOTATIONS_VERSION in names:
                    inputs["annotations_version"] = others[ANNOTATIONS_VERSION][1]
                    inputs["annotated_by"] = _settings_of_annotations(matrix, others[ANNOTATIONS_VERSION][0])
                return rows, inputs
    _refuse_unannotated(rows, texts)
    return rows, {}


def _other_tables(spark: "SparkSession", config: ExperimentConfig) -> dict[str, tuple["DataFrame", int]]:
    """The tables that may be joined, with their versions; tables that do not exist are left out."""
    others = {}
    uri = config.layout.table("instances")
    if (version := delta_log.newest_version(uri)) is not None:
        others[INSTANCES_VERSION] = (tables.read(spark, uri, version), version)
    uri = config.layout.table(schemas.ANNOTATIONS)
    if (newest := corpus_records.newest(uri)) is not None:
        # Maintenance changes no row, and may have removed the files of the version before it: read its version.
        others[ANNOTATIONS_VERSION] = (tables.read(spark, uri, newest.base), newest.version)
    return others


def _refuse_unannotated(rows: "DataFrame", texts: tuple[str, ...]) -> None:
    """Refuses expressions that name a column which `annotations` could have; `expressions` reports other errors.

    Raises:
        CorpusError: an expression names a table that does not exist.
    """
    groups = {column.name: group for group, own in schemas.ANNOTATIONS_BY_GROUP.items() for column in own}
    absent = groups.keys() - set(rows.columns)
    named = sorted(name for name in absent if any(re.search(rf"\b{name}\b", text) for text in texts))
    if named:
        wanted = ", ".join(sorted({groups[name] for name in named}))
        raise CorpusError(
            f"annotations: expected the columns {', '.join(named)}, which an expression names, found a table without "
            f"them, or none; give the config's section annotate ({wanted}) and run `miniplm annotate`"
        )


def _settings_of_annotations(matrix: "DataFrame", annotations: "DataFrame") -> Any:
    """The settings that the annotations were made with (`annotated_by`); None if there are no annotations.

    Raises:
        CorpusError: a pool instance of the matrix has no annotations.
    """
    missing = tables.missing_from(matrix.where("split = 'pool'").select("instance_id"), annotations)
    if n_missing := missing.count():
        raise CorpusError(
            f"annotations: expected all instances of score_matrix, found {n_missing} that are not annotated, for "
            f"example {missing.limit(1).collect()[0][0]}; run `miniplm annotate` first"
        )
    first_row = annotations.select("annotated_by").limit(1).collect()
    return json.loads(first_row[0][0]) if first_row else None
