"""Runs a function on an executor and brings its result, or its error, back to the driver.

`run_on_executor` runs a function in a task of its own; `run_over_rows` gives the function the batches of a frame with
one partition. The result is pickled, so it may be any value of this project's types. A MiniplmError is pickled too and
raised again on the driver, with its class and message; raised in the task, it would be retried and reach the driver as
text. Any other error fails the task: Spark retries it and then raises its own error. `error_in_text` finds a
MiniplmError in the text of Spark's errors, for tasks that do not go through this module. A retried task calls the
function again. Loads no pyspark.
"""

import contextlib
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from miniplm_udf import errors
from miniplm_udf.errors import MiniplmError, ModelLoadError
from miniplm_udf.progress import configure_logging
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.remote")

ANSWER_DDL = "value binary, error binary"

T = TypeVar("T")


def run_on_executor(spark: "SparkSession", function: Callable[[], T]) -> T:
    """Calls a function in one task on an executor.

    Args:
        spark: a session.
        function: picklable by Spark. It imports packages that only executors need, such as torch, by itself.

    Returns:
        The result of the function, pickled on the executor.

    Raises:
        MiniplmError: the error that the function raised, of the same class and with the same message.
    """

    def run(batches: "Iterator[pa.RecordBatch]") -> T:
        for _ in batches:  # read to the end: Spark ends a Python worker that leaves rows unread
            pass
        return function()

    return run_over_rows(spark.range(0, 1, 1, 1), run)


def run_over_rows(rows: "DataFrame", function: Callable[["Iterator[pa.RecordBatch]"], T]) -> T:
    """Calls a function on an executor, with the rows of a frame.

    Args:
        rows: a frame of one partition.
        function: see `run_on_executor`; called with the rows as record batches.

    Returns:
        The result of the function, pickled on the executor.

    Raises:
        MiniplmError: the error that the function raised, of the same class and with the same message.
    """
    (answer,) = rows.mapInArrow(answer_function(function), ANSWER_DDL).collect()
    return result_of(answer["value"], answer["error"])


def answer_function(
    function: Callable[["Iterator[pa.RecordBatch]"], object],
) -> Callable[["Iterator[pa.RecordBatch]"], "Iterator[pa.RecordBatch]"]:
    """Returns the function for `DataFrame.mapInArrow(answer_function(function), ANSWER_DDL)`: one row of ANSWER_DDL.

    Args:
        function: gets the record batches of a partition; its result must be picklable.
    """

    def answer(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        configure_logging()
        value = error = None
        try:
            value = pickle.dumps(function(batches))
        except MiniplmError as raised:
            error = pickle.dumps(raised)
        yield pa.RecordBatch.from_pylist([{"value": value, "error": error}], schema=schema_of(ANSWER_DDL))

    return answer


def result_of(value: bytes | None, error: bytes | None) -> Any:
    """The result in a row of ANSWER_DDL, on the driver.

    Args:
        value: the pickled result; None if there is an error.
        error: the pickled error; None if there is none.

    Raises:
        MiniplmError: the error in the row.
    """
    if error is not None:
        raise pickle.loads(error)
    assert value is not None
    return pickle.loads(value)


@contextlib.contextmanager
def model_errors(alias: str) -> Iterator[None]:
    """Raises any error of the block that is not a MiniplmError as a ModelLoadError that names the model.

    Args:
        alias: the model's alias, for the message.

    Raises:
        ModelLoadError: the block raised an error that is not a MiniplmError.
    """
    try:
        yield
    except MiniplmError:
        raise
    except Exception as error:  # libraries that load models raise anything; the traceback stays in the executor's log
        LOGGER.exception("models.%s: cannot be used", alias)
        raise ModelLoadError(f"models.{alias}: {type(error).__name__}: {error}") from error


def error_in_text(error: BaseException) -> MiniplmError | None:
    """Finds the MiniplmError of a task that the text of Spark's error quotes.

    Args:
        error: the error that Spark raised on the driver.

    Returns:
        An error of the same class with the first line of its message; None if the text quotes none.
    """
    # Spark appends lines of its own (SQLSTATE, the query, the stack), and nothing marks where the message ends.
    for name, message in re.findall(r"miniplm_udf\.errors\.(\w+): (.+)", str(error)):
        error_class = getattr(errors, name, None)
        if isinstance(error_class, type) and issubclass(error_class, MiniplmError):
            return error_class(message.strip())
    return None
