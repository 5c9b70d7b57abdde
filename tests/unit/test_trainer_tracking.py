"""MLflow's names from free text, and a tracking store that refuses or is away: the work continues."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.revision import code_commit
from trainer.tracking import run as tracking
from trainer.tracking.metric_names import safe_names
from trainer.tracking.store import existing_run

AWKWARD = [
    "", ".", "..", "../x", "a/b", "a//b", "a_b", "a b", "a:b", "/", "维基", "百科", "x" * 300, "x" * 301, "Web", "web",
    "WEB", "a\nb", "ß", "SS", " web", "web ", "\ud800", "a_b-0123456789",
]  # fmt: skip


def test_names_are_safe_unique_and_the_same_each_time() -> None:
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    names = safe_names(AWKWARD)
    assert set(names) == set(AWKWARD)
    assert len({name.lower() for name in names.values()}) == len(AWKWARD)
    for name in names.values():
        _validate_metric_name(f"heldout_bits_per_byte/{name}")
        assert len(f"heldout_bits_per_byte/{name}") <= MAX_ENTITY_KEY_LENGTH
        assert name.isascii()
    assert safe_names(reversed(AWKWARD)) == names
    # A name that was made from one text is not the name of another.
    made = safe_names(["a b"])["a b"]
    assert safe_names(["a b", made])[made] != made
    plain = ["web", "books", "C4-en_v1.2", "a_b"]
    assert safe_names(plain) == {name: name for name in plain}


class Refusing:
    """Stands for the `mlflow` module: every call fails, and is counted."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            self.calls += 1
            raise self.error

        return call


def errors() -> list[Exception]:
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    locked = sqlalchemy.exc.OperationalError("insert", {}, Exception("database is locked"))
    return [MlflowException("refused"), requests.exceptions.ConnectionError("away"), locked, PermissionError("disk")]


@pytest.mark.slow
@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_a_store_that_fails_stops_nothing_and_what_it_lacks_is_named(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    run = tracking.Run("small")
    run._mlflow = Refusing(error)
    run.log_params({"a": 1})
    run.log_table("file:///t", 0, "packed/kept/bpe", "d", None)
    for step in range(5):
        run.log_metrics({"loss": 1.0}, step=step)
    run.end("FINISHED", 0.5)
    assert "small: MLflow cannot be reached: " in caplog.text
    lost = "5 points of the curve (steps 0 to 4), parameters, dataset, tags of the dataset, lineage, end of the run"
    assert f"small: MLflow does not have {lost}: no answer" in caplog.text
    assert "Traceback" not in caplog.text


class Refuses:
    """Stands for the `mlflow` module: counts its calls, and refuses all."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        self.calls += 1
        raise MlflowException("the run is deleted", error_code=INVALID_PARAMETER_VALUE)


def test_after_three_refusals_in_a_row_mlflow_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = tracking.Run("small")
    run._mlflow = mlflow = Refuses()
    run.log_params({"a": 1})
    run.log_table("file:///t", 0, "packed/kept/bpe", "d", None)
    run.end("FINISHED", 60)
    assert mlflow.calls == 3
    assert "small: MLflow refuses the parameters: the run is deleted" in caplog.text
    assert "no further calls" in caplog.text


def test_an_error_of_ours_is_not_taken_for_mlflows() -> None:
    run = tracking.Run("small")
    run._mlflow = Refusing(KeyError("a fault in our code"))
    run.log_metrics({"loss": 1.0})
    with pytest.raises(KeyError, match="a fault in our code"):
        run.end("FINISHED", 60)


@pytest.mark.slow
def test_a_store_that_cannot_be_opened_gives_a_run_without_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Set first, so that it is unset again afterwards: MLflow itself sets it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    config = ExperimentConfig(root=str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mlflow.db").write_bytes(b"no database" * 1000)
    with tracking.tracked_run(config, "small", "1" * 32) as run:
        run.log_metrics({"loss": 1.0})
        assert run.run_id is None
    assert "small: MLflow refuses the start of the run" in caplog.text


class Stores:
    """Stands for the `mlflow` module with one run, in a store that is away, or has forgotten the run."""

    class exceptions:
        from mlflow.exceptions import MlflowException

    def __init__(self, error: Exception) -> None:
        self.error = error

    def MlflowClient(self) -> Any:
        raise self.error


def test_a_run_is_not_begun_again_because_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    with pytest.raises(MlflowException, match="connection refused"):
        existing_run(Stores(MlflowException("connection refused")), "1" * 32)
    forgotten = Stores(MlflowException("no run", error_code=RESOURCE_DOES_NOT_EXIST))
    assert existing_run(forgotten, "1" * 32) is None
    assert "is not in this store: a new run is started" in caplog.text


class WithoutArtifacts:
    """Stands for the `mlflow` module of a server that answers, but whose place of artifacts always fails."""

    def __init__(self, is_away: bool) -> None:
        self.is_away, self.sent = is_away, []  # type: bool, list[Any]

    def log_text(self, text: str, path: str) -> None:
        from mlflow.exceptions import MlflowException

        raise MlflowException("the bucket refuses the server")

    def MlflowClient(self) -> Any:
        return self

    def get_run(self, run_id: str) -> None:
        if self.is_away:
            self.log_text("", "")

    def log_batch(self, run_id: str, metrics: Any) -> None:
        self.sent += metrics

    def active_run(self) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags={"mlflow.source.git.commit": code_commit()}))

    def end_run(self, status: str) -> None:
        self.sent.append(status)


def test_artifacts_that_a_server_cannot_write_hold_no_metric_back(caplog: pytest.LogCaptureFixture) -> None:
    run = tracking.Run("small")
    run._mlflow = mlflow = WithoutArtifacts(is_away=False)
    run.log_start({"config.yaml": "root: /"}, 0)
    run.log_metrics({"loss": 1.0}, step=1)
    run.end("FINISHED", 60)
    assert "small: MLflow does not take the files of the start: the bucket refuses the server; the work" in caplog.text
    assert ([metric.value for metric in mlflow.sent[:-1]], mlflow.sent[-1]) == ([1.0], "FINISHED")


def test_artifacts_wait_for_a_server_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    run = tracking.Run("small")
    run._mlflow = mlflow = WithoutArtifacts(is_away=True)
    run.log_start({"config.yaml": "root: /"}, 0)
    run.log_metrics({"loss": 1.0}, step=1)
    run.end("FINISHED", 0.5)
    assert "small: MLflow does not have 1 points of the curve (steps 1 to 1), files of the start, end" in caplog.text
    assert mlflow.sent == []
