"""The SQL of a corpus's `score` and `where`: an expression that computes one column of the row. Driver only; no job.

    text + score_matrix (+ other tables, if it names their columns) -> the analysed expression, or a ConfigError

Refused, with the key in the config and the position in the text: SQL that does not parse or resolve, a value of another
type, subqueries, aggregates, window functions, generators, and functions whose value differs between runs. So an
expression reads no other table, writes none, and gives the same version again.
"""

import re
from typing import TYPE_CHECKING, Any

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# Columns about the run that wrote a row: their values would differ if the row were ingested or scored again.
_OF_THE_RUN = ("query_id", "batch_id", "ingested_at", "instance_batch_id", "annotated_by", "minhash_buckets")


def resolves(rows: "DataFrame", *texts: str) -> bool:
    """Whether the rows have every column that the expressions name; True for an expression that does not parse.

    Args:
        rows: a frame with the columns.
        texts: SQL expressions.
    """
    from pyspark.errors import AnalysisException, ParseException
    from pyspark.sql import functions as F

    try:
        for text in texts:
            rows.select(F.expr(text))
    except ParseException:
        return True
    except AnalysisException:
        return False
    return True


def joined(matrix: "DataFrame", *others: "DataFrame") -> "DataFrame":
    """Returns the pool rows of the matrix with the other tables' own columns; shuffles all tables.

    Args:
        matrix: rows with `instance_id` and `split`.
        others: tables with one row for each `instance_id`: `instances`, `annotations`.
    """
    rows = matrix.where("split = 'pool'")
    for other in others:
        pool = other.where("split = 'pool'") if "split" in other.columns else other
        rows = rows.join(pool.select("instance_id", *own_columns(other, rows)), "instance_id")
    return rows


def own_columns(other: "DataFrame", rows: "DataFrame") -> list[str]:
    """Lists the columns of another table that expressions may name and that the rows do not have.

    Args:
        other: the other table.
        rows: the rows.

    Returns:
        Names, in the order of `other`, without columns about the run that wrote a row (`query_id`, ...).
    """
    return [name for name in other.columns if name not in {*rows.columns, *_OF_THE_RUN}]


def expression(
    rows: "DataFrame", text: str, place: str, wanted: type, what: str, over: str = "score_matrix"
) -> "Column":
    """Checks an expression.

    Args:
        rows: the rows that it is evaluated over.
        text: the SQL.
        place: the key in the config, or the option on the command line, for messages.
        wanted: Spark's class of the type that it must have.
        what: the wanted type in words.
        over: the rows in words.

    Returns:
        The expression as a column.

    Raises:
        ConfigError: it is not SQL over the columns, computes more than a column of the row, has another type, or may
            differ between runs.
    """
    from pyspark.errors import AnalysisException, ParseException
    from pyspark.sql import functions as F

    columns = f"columns are {', '.join(name for name in rows.columns if name not in _OF_THE_RUN)}"
    try:
        analysed = rows.select("instance_id", F.expr(text).alias("value"))
        value_type = analysed.schema["value"].dataType
    except (ParseException, AnalysisException) as error:
        raise ConfigError(f"{place}: {text!r} is no SQL over {over}{position(error)}; {columns}") from error
    refused = _more_than_a_column(rows, analysed, text)
    if refused:
        raise ConfigError(f"{place}: expected a value of the row itself, found {text!r}, which has {refused}")
    if not isinstance(value_type, wanted):
        raise ConfigError(
            f"{place}: expected {what}, found {text!r}, which is of type {value_type.simpleString()}; {columns}"
        )
    return F.expr(text)


def _more_than_a_column(rows: "DataFrame", analysed: "DataFrame", text: str) -> str | None:
    """In words, what an expression does besides computing a value from the row's columns; None if nothing."""
    plan, below = (frame._jdf.queryExecution().analyzed() for frame in (analysed, rows))
    patterns: Any = rows.sparkSession._jvm
    patterns = patterns.org.apache.spark.sql.catalyst.trees.TreePattern
    scala_list = plan.expressions()
    parts = [scala_list.apply(index) for index in range(scala_list.size())]
    if any(part.containsPattern(patterns.PLAN_EXPRESSION()) for part in parts):
        spot = re.search(r"\bselect\b|\bexists\b", text, re.IGNORECASE)
        return f"a subquery{f' (at character {spot.start() + 1})' if spot else ''}; other tables cannot be read here"
    if plan.nodeName() != "Project" or not plan.child().equals(below):
        return "an aggregate, a window function or a generator; rows are only counted by select"
    # Spark treats the time and the user as constants, but they differ in the next run.
    if not plan.deterministic() or any(part.containsPattern(patterns.CURRENT_LIKE()) for part in parts):
        return (
            "a random part, or one that depends on the time or the user; expected the same value in every run "
            "(select.rule: random, gumbel)"
        )
    return None


def position(error: Any) -> str:
    """Describes where an SQL text is wrong, for an error message.

    Args:
        error: Spark's `ParseException` or `AnalysisException`.

    Returns:
        The position, if Spark tells it, and the first line of Spark's long message, in parentheses after a space.
    """
    message = str(error).strip().splitlines()[0]
    contexts = error.getQueryContext() or []
    spot = f"at character {contexts[0].startIndex() + 1}: " if contexts and contexts[0].startIndex() >= 0 else ""
    line = re.search(r"\(line \d+, pos \d+\)", str(error))
    return f" ({spot}{message}{' ' + line.group() if line and line.group() not in message else ''})"
