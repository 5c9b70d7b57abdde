"""Long trainings as users run them: killed twenty times, under torchrun, and with an MLflow server that goes away."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.tracking import MlflowConfig
from tests.support.mlflow_server import MlflowServer
from tests.support.trainer_process import KillableTraining, check_killed_training, copied, until
from tests.support.trainer_roots import make_root, write_config
from trainer.tracking import run as tracking

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_root(folder)
    return folder


def test_a_training_that_is_killed_twenty_times_ends_with_the_same_weights(prepared: Path, tmp_path: Path) -> None:
    whole, killed = (copied(prepared, tmp_path / name, 800) for name in ("whole", "killed"))
    whole.finish()
    in_saves = check_killed_training(whole, killed, kills=20)
    assert in_saves >= 3, "too few kills hit a save: the test does not show what it should"


def torchrun(*arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_torchrun_with_different_folders_ends_and_writes_nothing(prepared: Path, tmp_path: Path) -> None:
    roots = tmp_path / "roots"
    for rank in range(2):
        folder = roots / f"rank{rank}"
        shutil.copytree(prepared, folder)
        write_config(folder, folder / "root")
    training = KillableTraining(roots / "rank0", 20)
    training.finish()
    shutil.rmtree(roots / "rank0" / "root" / "models" / "small")
    write_config(roots / "rank1", roots / "rank1" / "root", **training.train)
    before = files(roots)
    log = tmp_path / "torchrun.log"
    process = torchrun("-m", "tests.support.own_roots", str(roots), log=log)
    assert process.wait(600) != 0
    text = log.read_text()
    assert "miniplm: CorpusError: rank 1 and rank 0 see different checkpoints " in text
    assert "root must be one folder that all machines share" in text
    assert files(roots) == before


def test_sigterm_to_torchrun_saves_and_the_next_start_goes_on(prepared: Path, tmp_path: Path) -> None:
    training = copied(prepared, tmp_path / "run", 600)
    process = torchrun("-m", "trainer", *training.arguments, log=training.log)
    while training.newest_step() == 0:
        assert process.poll() is None, training.log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) != 0  # torchrun itself reports the signal; its ranks end with 0
    log = training.log.read_text()
    assert log.count("miniplm: the training was stopped by SIGTERM") == 2
    assert f"stopped after step {training.newest_step()}, which is saved" in log
    assert f'"stopped_after": {training.newest_step()}' in log
    assert 0 < training.newest_step() < 600
    training.finish()  # on one process
    assert training.runs() == [("FINISHED", training.logged_steps())]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    # Set first, so that it is unset again afterwards: MLflow itself sets it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    server = MlflowServer(tmp_path)
    yield server
    server.stop()


def test_a_server_that_is_away_for_a_minute_loses_no_point_of_a_training(
    prepared: Path, tmp_path: Path, server: MlflowServer
) -> None:
    server.start()
    copied(prepared, tmp_path / "run", 400)
    training = KillableTraining(tmp_path / "run", 400, server.uri)
    process = training.start()
    until(lambda: training.newest_step() > 100, process)
    server.stop()
    stopped = time.monotonic()
    until(lambda: training.newest_step() == 400, process)
    time.sleep(max(0.0, stopped + 60 - time.monotonic()))
    server.start()
    process.join()
    log = training.log.read_text()
    assert process.exitcode == 0, log
    assert "MLflow is back after" in log
    assert "does not have" not in log
    assert training.runs() == [("FINISHED", training.logged_steps())]


@pytest.mark.parametrize("away_at", ["start", "middle", "end"])
def test_an_mlflow_server_that_goes_away_loses_no_point(
    tmp_path: Path, server: MlflowServer, caplog: pytest.LogCaptureFixture, away_at: str
) -> None:
    caplog.set_level("INFO", logger="miniplm")
    config = ExperimentConfig(root=str(tmp_path), mlflow=MlflowConfig(tracking_uri=server.uri, wait_seconds=300))

    def leave() -> None:
        """Takes the server away for some steps, until the run has noticed it."""
        server.stop()
        for _ in range(20):
            log_step()
        while "MLflow cannot be reached" not in caplog.text:
            time.sleep(0.1)

    def log_step() -> None:
        nonlocal step
        step += 1
        run.log_metrics({"train_loss": 1 / step}, step=step)

    step = 0
    if away_at != "start":
        server.start()
    with tracking.tracked_run(config, "small") as run:
        assert (run.run_id is None) == (away_at == "start")
        run.log_params({"a": 1})
        for _ in range(10):
            log_step()
        if away_at != "start":
            leave()
        if away_at == "end":
            threading.Timer(5.0, server.start).start()
        else:
            server.start()
            for _ in range(10):
                log_step()
    assert "MLflow is back after" in caplog.text
    assert "does not have" not in caplog.text
    client = mlflow.MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("miniplm").experiment_id])
    assert (found.info.run_id, found.info.status, found.data.params) == (run.run_id, "FINISHED", {"a": "1"})
    points = client.get_metric_history(run.run_id, "train_loss")
    assert [(point.step, point.value) for point in points] == [(n, 1 / n) for n in range(1, step + 1)]
    assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
