"""What a corpus's `score` and `where` may be: Spark SQL that computes one column of the row. Driver only; runs no job.

    text + score_matrix (+ other tables where a column of them is named) -> the analysed expression, or a ConfigError

Refused, named with the place in the config and the position in the text: what does not parse or resolve, another type,
subqueries, aggregates and window functions, generators, and what differs from run to run. So an expression reads no
other table, writes none, and gives the same version again. Nothing is retried: nothing runs.
"""

import re
from typing import TYPE_CHECKING, Any

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# Of any table: they tell how a row came, not what it is, and are not the same where it is ingested or scored anew.
_OF_THE_RUN = ("query_id", "batch_id", "ingested_at", "instance_batch_id", "annotated_by", "minhash_buckets")


def resolves(rows: "DataFrame", *texts: str) -> bool:
    """Whether the rows have every column that these expressions name."""
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
    """Pool rows of the matrix with the other tables' own columns beside: rows of all tables move between tasks.

    Args:
        others: by instance_id: `instances`, `annotations`.
    """
    rows = matrix.where("split = 'pool'")
    for other in others:
        of_pool = other.where("split = 'pool'") if "split" in other.columns else other
        rows = rows.join(of_pool.select("instance_id", *own_columns(other, rows)), "instance_id")
    return rows


def own_columns(other: "DataFrame", rows: "DataFrame") -> list[str]:
    """Columns of another table that expressions may name and that the rows do not have."""
    return [name for name in other.columns if name not in {*rows.columns, *_OF_THE_RUN}]


def expression(
    rows: "DataFrame", text: str, place: str, wanted: type, what: str, over: str = "score_matrix"
) -> "Column":
    """The expression, checked.

    Args:
        rows: what it is over; `over` is that in words.
        place: in the config, or on the command line.
        wanted: Spark's class of the type it must have; `what` is that in words.

    Raises:
        ConfigError: it is no SQL over the columns, more than a column of the row, of another type, or differs from run
            to run.
    """
    from pyspark.errors import AnalysisException, ParseException
    from pyspark.sql import functions as F

    columns = f"columns are {', '.join(name for name in rows.columns if name not in _OF_THE_RUN)}"
    try:
        analysed = rows.select("instance_id", F.expr(text).alias("value"))
        found = analysed.schema["value"].dataType
    except (ParseException, AnalysisException) as error:
        raise ConfigError(f"{place}: {text!r} is no SQL over {over}{position(error)}; {columns}") from error
    refused = _more_than_a_column(rows, analysed, text)
    if refused:
        raise ConfigError(f"{place}: expected a value of the row itself, found {text!r}, which has {refused}")
    if not isinstance(found, wanted):
        raise ConfigError(
            f"{place}: expected {what}, found {text!r}, which is of type {found.simpleString()}; {columns}"
        )
    return F.expr(text)


def _more_than_a_column(rows: "DataFrame", analysed: "DataFrame", text: str) -> str | None:
    """What an expression does beyond computing a column from the row's, in words; None where that is all."""
    plan, below = (frame._jdf.queryExecution().analyzed() for frame in (analysed, rows))
    patterns: Any = rows.sparkSession._jvm
    patterns = patterns.org.apache.spark.sql.catalyst.trees.TreePattern
    own = plan.expressions()
    own = [own.apply(index) for index in range(own.size())]
    if any(one.containsPattern(patterns.PLAN_EXPRESSION()) for one in own):
        spot = re.search(r"\bselect\b|\bexists\b", text, re.IGNORECASE)
        return f"a subquery{f' (at character {spot.start() + 1})' if spot else ''}; other tables cannot be read here"
    if plan.nodeName() != "Project" or not plan.child().equals(below):
        return "an aggregate, a window function or a generator; rows are only counted by select"
    # The time and the user are constants to Spark, and other ones in the next run.
    if not plan.deterministic() or any(one.containsPattern(patterns.CURRENT_LIKE()) for one in own):
        return (
            "a part that is random or of the moment; expected the same value in every run (select.rule: random, gumbel)"
        )
    return None


def position(error: Any) -> str:
    """Where and what, of Spark's long message."""
    message = str(error).strip().splitlines()[0]
    contexts = error.getQueryContext() or []
    spot = f"at character {contexts[0].startIndex() + 1}: " if contexts and contexts[0].startIndex() >= 0 else ""
    found = re.search(r"\(line \d+, pos \d+\)", str(error))
    return f" ({spot}{message}{' ' + found.group() if found and found.group() not in message else ''})"
