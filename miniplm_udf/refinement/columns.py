"""The rows that expressions are over: the matrix, and beside it other columns of its instances where one is named.

    score_matrix (+ instances) (+ annotations) -> pool rows with the columns that `score` and `where` name

A table is joined only where an expression needs a column of it, so a refinement pays for what it names. An instance
that is not annotated yet would pass or fail for want of a value; so there must be none. Driver only. One look for such
rows is run; nothing is written.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, schemas, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.refinement import expressions

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

INSTANCES_VERSION, ANNOTATIONS_VERSION = "instances_version", "annotations_version"


def with_instances(
    spark: "SparkSession", config: ExperimentConfig, matrix: "DataFrame", *texts: str
) -> tuple["DataFrame", dict[str, Any]]:
    """The matrix, with columns of `instances` and of `annotations` beside where the expressions name such.

    Returns:
        And the versions that they are of (`instances_version`, `annotations_version`) and, of annotations, what they
        were made by (`annotated_by`); of what is read alone.

    Raises:
        CorpusError: columns of `annotations` are named that are not there, or that not all rows have.
    """
    if expressions.resolves(matrix, *texts):
        return matrix, {}
    others = _tables(spark, config)
    # One table, if that is enough; else all, so that an error tells what there is.
    for chosen in ([INSTANCES_VERSION], [ANNOTATIONS_VERSION], list(others)):
        if set(chosen) <= others.keys():
            rows = expressions.joined(matrix, *(others[name][0] for name in chosen))
            if expressions.resolves(rows, *texts):
                read: dict[str, Any] = {name: others[name][1] for name in chosen}
                if ANNOTATIONS_VERSION in chosen:
                    read["annotated_by"] = _checked(matrix, others[ANNOTATIONS_VERSION][0])
                return rows, read
    _refuse_unannotated(rows, texts)
    return rows, {}


def _tables(spark: "SparkSession", config: ExperimentConfig) -> dict[str, tuple["DataFrame", int]]:
    """What there is beside the matrix, and its version."""
    found = {}
    uri = config.table_uri("instances")
    if (version := tables.version(spark, uri)) is not None:
        found[INSTANCES_VERSION] = (tables.read(spark, uri, version), version)
    uri = config.table_uri(schemas.ANNOTATIONS)
    if (newest := corpora.newest(spark, uri)) is not None:
        # Maintenance changes no row, and may remove the files of the version before it.
        found[ANNOTATIONS_VERSION] = (tables.read(spark, uri, newest.base), newest.version)
    return found


def _refuse_unannotated(rows: "DataFrame", texts: tuple[str, ...]) -> None:
    """Tells of columns that `annotations` could have; what else is wrong is for `expressions.expression` to say.

    Raises:
        CorpusError: one is named.
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


def _checked(matrix: "DataFrame", annotations: "DataFrame") -> Any:
    """What the annotations were made by, if all rows have some.

    Raises:
        CorpusError: some have none.
    """
    missing = tables.missing_from(matrix.where("split = 'pool'").select("instance_id"), annotations)
    if n_missing := missing.count():
        raise CorpusError(
            f"annotations: expected all instances of score_matrix, found {n_missing} that are not annotated, for "
            f"example {missing.limit(1).collect()[0][0]}; run `miniplm annotate` first"
        )
    made_by = annotations.select("annotated_by").limit(1).collect()
    return json.loads(made_by[0][0]) if made_by else None
