"""What of Structured Streaming needs no JVM."""

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.streams.query import executor_error


def test_an_executors_error_comes_back_as_itself() -> None:
    carried = RuntimeError(
        "Job aborted due to stage failure: ... Traceback (most recent call last):\n"
        '  File "x.py", line 3\n'
        "miniplm_udf.errors.ModelLoadError: /models/x: its logits are scaled in a way that is not known\n"
        "\n\tat org.apache"
    )
    found = executor_error(carried)
    assert isinstance(found, ModelLoadError)
    assert str(found) == "/models/x: its logits are scaled in a way that is not known"


def test_another_error_is_not_ours() -> None:
    assert executor_error(RuntimeError("ValueError: miniplm_udf.errors.NoSuchError: x")) is None
    assert executor_error(RuntimeError("java.io.IOException")) is None
