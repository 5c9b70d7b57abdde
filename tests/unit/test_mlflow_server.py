"""A training against a real MLflow server on loopback: one run, killed and resumed, its artifacts, parent and model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from miniplm_udf.config.experiment import load_config
from tests.support.killed_training import killed_after_logging, train_small
from tests.support.mlflow_server import MlflowServer
from tests.support.trainer_roots import make_root, write_config
from trainer.__main__ import main
from trainer.tracking.store import connect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


def test_a_server_has_one_run_of_a_killed_and_resumed_training(
    server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    make_root(tmp_path)
    (tmp_path / "root" / "mlflow.db").unlink()
    path = write_config(tmp_path, tmp_path / "root")
    words = [
        f"mlflow.tracking_uri={server.uri}",
        "mlflow.parent_run=sweep",
        "mlflow.registered_model={student}",
        "mlflow.system_metrics=true",
    ]
    config = load_config(path, words)
    with killed_after_logging(step=5):
        train_small(config)
    assert main(["train", "-c", str(path), "--student", "small", *words]) == 0
    training = json.loads(capsys.readouterr().out)["small"]
    assert not (tmp_path / "root" / "mlflow.db").exists()

    mlflow = connect(config)
    client = mlflow.MlflowClient()
    runs = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("miniplm").experiment_id])
    }
    assert {name: run.info.status for name, run in runs.items()} == {"small": "FINISHED", "sweep": "FINISHED"}
    run = runs["small"]
    assert run.info.run_id == training["run_id"]
    assert run.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "train_loss")}
    assert steps == {1, 2, 3, 4, 5, 6}
    assert any(name.startswith("system/") for name in run.data.metrics)
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == training["manifest_hash"]
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert load_config(folder / "config.yaml") == config
    assert (folder / "resumed_after_step_4" / "requirements.txt").exists()
    pipeline = mlflow.transformers.load_model(f"models:/small/{training['registered']['version']}")
    assert pipeline.model.config.hidden_size == 16
