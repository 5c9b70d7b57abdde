"""A function's result and its error on the way from an executor to the driver: the part that needs no JVM."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from miniplm_udf import errors
from miniplm_udf.annotations import packages
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.workers.ddl import schema_of
from miniplm_udf.workers.remote import ANSWER_DDL, answer_function, error_in_text, model_errors, result_of

BATCHES = [pa.RecordBatch.from_pydict({"text": texts}) for texts in (["a", "b"], ["c"])]


def called_remotely(function: Callable[[Iterator[pa.RecordBatch]], Any]) -> Any:
    """Calls a function as Spark would: pickled, over batches, its answer back as plain bytes."""
    cloudpickle = pytest.importorskip("pyspark.cloudpickle")
    answer = cloudpickle.loads(cloudpickle.dumps(answer_function(function)))
    (batch,) = answer(iter(BATCHES))
    assert batch.schema == schema_of(ANSWER_DDL)
    (row,) = batch.to_pylist()
    return result_of(row["value"], row["error"])


def test_the_result_comes_back() -> None:
    assert called_remotely(lambda batches: [batch.num_rows for batch in batches]) == [2, 1]
    assert called_remotely(lambda batches: None) is None


@pytest.mark.parametrize(
    "error_class",
    [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.MiniplmError)],
)
def test_an_error_of_ours_comes_back_with_class_and_message(error_class: type[Exception]) -> None:
    message = "models.teacher: expected a folder,\nfound 'x': 5 %"

    def fails(batches: Iterator[pa.RecordBatch]) -> None:
        raise error_class(message)

    with pytest.raises(errors.MiniplmError) as caught:
        called_remotely(fails)
    assert type(caught.value) is error_class
    assert str(caught.value) == message


def test_another_error_fails_the_task() -> None:
    (first,) = BATCHES[:1]
    with pytest.raises(ZeroDivisionError):
        next(answer_function(lambda batches: 1 // 0)(iter([first])))


def test_an_unexpected_error_names_the_model() -> None:
    def fails(batches: Iterator[pa.RecordBatch]) -> None:
        with model_errors("teacher"):
            raise KeyError("hidden_size")

    with pytest.raises(ModelLoadError, match=r"^models\.teacher: KeyError: 'hidden_size'$"):
        called_remotely(fails)
    with pytest.raises(ConfigError, match=r"^as it was$"), model_errors("teacher"):
        raise ConfigError("as it was")


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"annotate\.language: expected the package no_such_package"):
        called_remotely(lambda batches: packages._version("language", "no_such_package"))
    assert packages._version("language", "pytest") == pytest.__version__


def test_an_error_in_sparks_text_comes_back_as_itself() -> None:
    carried = RuntimeError(
        "Job aborted due to stage failure: ... Traceback (most recent call last):\n"
        '  File "x.py", line 3\n'
        "miniplm_udf.errors.ModelLoadError: /models/x: its logits are scaled in a way that is not known\n"
        "\n\tat org.apache"
    )
    error = error_in_text(carried)
    assert isinstance(error, ModelLoadError)
    assert str(error) == "/models/x: its logits are scaled in a way that is not known"


def test_text_without_an_error_of_ours_gives_none() -> None:
    assert error_in_text(RuntimeError("ValueError: miniplm_udf.errors.NoSuchError: x")) is None
    assert error_in_text(RuntimeError("java.io.IOException")) is None
