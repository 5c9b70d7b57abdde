"""MLflow has a description of each start of a training: config, code, packages, device; checkpoints; system metrics."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config, to_yaml
from miniplm_udf.errors import MiniplmError
from miniplm_udf.revision import code_commit, code_revision
from tests.support.killed_training import killed_after_logging, train_small
from tests.support.trainer_roots import make_root, write_config
from trainer.tracking import environment
from trainer.tracking.outbox import Outbox, Point
from trainer.tracking.run import tracked_run
from trainer.tracking.store import connect

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SECRETS = ["mlflow.experiment=miniplm", "spark.conf={spark.hadoop.fs.s3a.secret.key: abc123}"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_root(tmp_path)
    return load_config(write_config(tmp_path, tmp_path / "root"), SECRETS)


def artifacts(client: Any, run_id: str) -> dict[str, str]:
    """Text of each artifact of a run, by path."""
    folder = Path(client.download_artifacts(run_id, ""))
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_run_has_config_code_packages_and_the_newest_checkpoint(config: ExperimentConfig, tmp_path: Path) -> None:
    training = train_small(config)
    client = connect(config).MlflowClient()
    files = artifacts(client, training["run_id"])
    assert set(files) == {"config.yaml", "environment.json", "requirements.txt", "lineage.json"}
    assert not [text for text in files.values() if "abc123" in text]
    (tmp_path / "again.yaml").write_text(files["config.yaml"])
    again = load_config(tmp_path / "again.yaml", SECRETS)
    assert again == config
    assert train_small(again)["skipped"]
    assert any(line.startswith("torch==") for line in files["requirements.txt"].splitlines())
    described = json.loads(files["environment.json"])
    assert (described["code_revision"], described["device"], described["ranks"]) == (code_revision(), "cpu", 1)
    tags = client.get_run(training["run_id"]).data.tags
    assert tags.get("mlflow.source.git.commit") == code_commit()
    assert (tags["code_revision"], tags["device"], tags["ranks"]) == (code_revision(), "cpu", "1")
    checkpoint = Path(storage.local_path(tags["checkpoint_uri"]))
    assert json.loads((checkpoint / "state.json").read_text())["steps_done"] == int(tags["checkpoint_step"]) == 6
    assert tags["model_uri"] == config.layout.model("small")


def test_each_start_of_one_run_keeps_its_own_files(config: ExperimentConfig, tmp_path: Path) -> None:
    with killed_after_logging(step=5):
        train_small(config)
    other = load_config(write_config(tmp_path, tmp_path / "root", log_every_steps=3))
    training = train_small(other)
    client = connect(config).MlflowClient()
    files = artifacts(client, training["run_id"])
    names = {"config.yaml", "environment.json", "requirements.txt"}
    assert set(files) == {*names, "lineage.json", *(f"resumed_after_step_4/{name}" for name in names)}
    assert files["resumed_after_step_4/config.yaml"] == to_yaml(other) != files["config.yaml"]
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [training["run_id"]]


def test_a_run_that_was_killed_before_its_facts_were_sent_gets_them(config: ExperimentConfig) -> None:
    client = connect(config).MlflowClient()
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    bare = client.create_run(experiment, run_name="small").info.run_id
    with tracked_run(config, "small", bare) as run:
        assert (run.run_id, run.is_new) == (bare, True)
        run.set_tags({"fingerprint": "f"})
    with tracked_run(config, "small", bare) as run:
        assert (run.run_id, run.is_new) == (bare, False)


def test_a_run_whose_start_was_not_answered_is_found_again(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = connect(config)
    original, answers = mlflow.start_run, []

    def create_and_lose_the_first_answer(**options: Any) -> Any:
        answers.append(original(**options))
        if len(answers) == 1:
            mlflow.end_run("RUNNING")
            raise ConnectionError("no answer")
        return answers[-1]

    monkeypatch.setattr(mlflow, "start_run", create_and_lose_the_first_answer)
    run_id = train_small(config)["run_id"]
    assert [answer.info.run_id for answer in answers] == [run_id, run_id]
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("miniplm").experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.params["train.steps"]


def test_training_again_that_was_killed_goes_on(config: ExperimentConfig, tmp_path: Path) -> None:
    first = train_small(config)
    with killed_after_logging(step=5):
        train_small(config, retrain=True)
    assert train_small(config)["run_id"] == first["run_id"]  # the finished model is still there
    second = train_small(config, retrain=True)
    client = connect(config).MlflowClient()
    assert any(name.startswith("resumed_after_step_4/") for name in artifacts(client, second["run_id"]))
    assert train_small(config)["run_id"] == second["run_id"]
    third = train_small(config, retrain=True)
    assert not any(name.startswith("resumed_after") for name in artifacts(client, third["run_id"]))
    assert len({first["run_id"], second["run_id"], third["run_id"]}) == 3
    assert first["final_loss"] == second["final_loss"] == third["final_loss"]


def test_training_again_that_lost_its_last_upload_goes_on(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_small(config)
    record = Path(storage.local_path(config.layout.model("small", "training.json")))

    def upload_half(*arguments: Any, **options: Any) -> None:
        record.unlink()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.results.model_folder.storage.upload_folder", upload_half)
        with pytest.raises(MiniplmError, match="step 6 is saved, and the same command writes the model from it"):
            train_small(config, retrain=True)
    second = train_small(config, retrain=True)
    client = connect(config).MlflowClient()
    assert any(name.startswith("resumed_after_step_6/") for name in artifacts(client, second["run_id"]))
    assert second["final_loss"] == first["final_loss"]


def test_a_run_of_another_experiment_is_not_continued(
    config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = train_small(config)["run_id"]
    other = dataclasses.replace(config, mlflow=dataclasses.replace(config.mlflow, experiment="other"))
    with tracked_run(other, "small", run_id) as run:
        run.log_metrics({"loss": 1.0})
    assert f"MLflow run {run_id} is in another experiment: a new run is started" in caplog.text
    client = connect(other).MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_tags_name_the_repository_of_this_package_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    commit, branch, url = (f"mlflow.source.git.{name}" for name in ("commit", "branch", "repoURL"))
    other = {commit: "b" * 40, branch: "main", url: "https://me:secret@host/other", "stage": "train"}
    monkeypatch.setattr(environment, "code_commit", lambda: "a" * 40)
    assert environment.code_tags(other) == {commit: "a" * 40, branch: None, url: None}
    assert environment.code_tags({}) == {commit: "a" * 40}
    assert environment.code_tags({**other, commit: "a" * 40}) == {url: "https://host/other"}
    monkeypatch.setattr(environment, "code_commit", lambda: None)
    assert environment.code_tags(other) == {commit: None, branch: None, url: None}
    assert environment.code_tags({"stage": "train"}) == {}


def test_artifacts_that_cannot_be_written_hold_no_metric_back(
    config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(storage.local_path(config.root))
    (root / "mlartifacts").write_text("a file where MLflow wants a folder")
    training = train_small(config)
    assert "small: MLflow does not take the files of the start: " in caplog.text
    run = connect(config).MlflowClient().get_run(training["run_id"])
    assert (run.info.status, "train_loss" in run.data.metrics, run.data.tags["stage"]) == ("FINISHED", True, "train")


def test_the_use_of_the_machine_is_logged_and_goes_on_after_a_resume(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    client = connect(config).MlflowClient()
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    an_hour_ago = time.time_ns() // 1_000_000 - 3_600_000
    run_id = client.create_run(experiment, start_time=an_hour_ago, run_name="small").info.run_id
    with tracked_run(config, "small", run_id) as run:
        run.measure_system()
        while len(steps(client, run_id)) < 2:
            time.sleep(0.1)
    logged = steps(client, run_id)
    assert logged == sorted(logged)
    assert logged[0] >= 3600, "a resumed run began its steps at 0 again"
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(
        client.get_run(run_id).data.metrics
    )


def steps(client: Any, run_id: str) -> list[int]:
    """Steps of a system metric, in the order of time."""
    points = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    return [point.step for point in sorted(points, key=lambda point: point.timestamp)]


def test_lost_values_of_the_machine_are_not_named_as_steps_of_the_curve(caplog: pytest.LogCaptureFixture) -> None:
    import requests

    def refuse(points: Any) -> None:
        raise requests.exceptions.ConnectionError("away")

    outbox = Outbox("small", refuse)
    outbox.point(Point({"system/cpu_utilization_percentage": 1.0}, 9000, 0))
    outbox.point(Point({"train_loss": 1.0}, 7, 0))
    outbox.close(0.1)
    assert "1 points of the curve (steps 7 to 7)" in caplog.text
