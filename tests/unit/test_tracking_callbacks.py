"""TensorBoard and W&B next to MLflow: one protocol, failures that stop nothing, a resumed curve without doubles."""

import json
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.targets import student_target
from miniplm_udf.errors import ConfigError
from tests.support.killed_training import killed_after_logging, train_small
from tests.support.trainer_roots import make_root, write_config
from trainer.__main__ import main
from trainer.evaluation.run import evaluate
from trainer.tracking import callbacks
from trainer.tracking import run as tracking
from trainer.tracking.callbacks import Callbacks
from trainer.tracking.store import connect

pytestmark = pytest.mark.slow

STEPS = [1, 2, 3, 4, 5, 6]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_root(tmp_path)
    return write_config(tmp_path, tmp_path / "root")


class Recording:
    """A tracker that keeps its calls, and fails in the call that it is told."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, []  # type: str, list[tuple[Any, ...]]

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.failing:
            raise RuntimeError("no connection\nand more")

    def on_start(self, params: Any, tags: Any) -> None:
        self._call("start", params, tags)

    def on_metrics(self, values: Any, step: Any) -> None:
        self._call("metrics", values, step)

    def on_end(self, status: str) -> None:
        self._call("end", status)


def test_a_training_tells_a_tracker_its_facts_its_points_and_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recording()
    monkeypatch.setattr("trainer.train.callbacks_of", lambda *arguments: Callbacks([tracker]))
    train_small(load_config(path))
    start, *points, last, end = tracker.calls
    assert start[1]["train"]["learning_rate"] == 0.01
    assert (start[2]["delta_table_version"], start[2]["refined_version"], start[2]["stage"]) == ("0", "3", "train")
    assert [(name, step) for name, _, step in points] == [("metrics", step) for step in STEPS]
    assert all(values["train_loss"] > 0 for _, values, _ in points)
    assert (set(last[1]), last[2]) == ({"seconds", "final_loss"}, None)
    assert end == ("end", "FINISHED")


@pytest.mark.parametrize("failing", ["start", "metrics", "end"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(caplog: pytest.LogCaptureFixture, failing: str) -> None:
    broken, whole = Recording(failing), Recording()
    run = tracking.Run("small", Callbacks([broken, whole]))
    run.callbacks.on_start({}, {})
    for step in STEPS:
        run.log_metrics({"train_loss": 1.0}, step=step)
    run.end("FINISHED", 1.0)
    assert [call[0] for call in whole.calls] == ["start", *["metrics"] * 6, "end"]
    assert [call[0] for call in broken.calls].count(failing) == 1
    assert broken.calls[-1][0] == failing
    warning = "Recording gets no further values: RuntimeError: no connection; the work continues"
    assert [record.message for record in caplog.records].count(warning) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_starts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda package: None)
    assert main(["train", "-c", str(path), "--student", "small", f"{name}={{}}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"miniplm: ConfigError: {name}: expected the package {name}, which is not installed: ")
    assert f"pip install 'miniplm[{name}]'" in error
    assert not (tmp_path / "root" / "_checkpoints").exists()


def test_the_sections_are_checked(path: Path) -> None:
    assert load_config(path).tensorboard is None
    with pytest.raises(ConfigError, match=r"unknown key wandb\.projekt; did you mean 'project'"):
        load_config(path, ["wandb={projekt: x}"])
    with pytest.raises(ConfigError, match=r"wandb"):
        load_config(path, ["wandb={mode: sometimes}"])


def tensorboard_points(folder: Path, name: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [point.step for point in events.Scalars(name)]


def test_tensorboard_shows_a_resumed_training_as_one_curve(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard")
    config = load_config(path, ["tensorboard={}"])
    with killed_after_logging(step=5):
        train_small(config)
    (folder,) = (tmp_path / "root" / "tensorboard" / "small").iterdir()
    assert tensorboard_points(folder, "train_loss") == [1, 2, 3, 4, 5]
    train_small(config)
    assert tensorboard_points(folder, "train_loss") == STEPS
    assert tensorboard_points(folder, "final_loss") == [6]
    # The evaluation goes on in the same folder, a new training gets its own.
    evaluate(config, [student_target(config, "small")])
    assert tensorboard_points(folder, "heldout_nats_per_token") == [6]
    assert tensorboard_points(folder, "train_loss") == STEPS
    train_small(config, retrain=True)
    assert len(list(folder.parent.iterdir())) == 2


def wandb_runs(folder: Path) -> list[tuple[str, list[int], dict[str, Any], dict[str, Any]]]:
    """Id, logged steps, config and summary of each file of an offline run, the oldest first."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    runs = []
    for file in sorted(folder.glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        store = DataStore()
        store.open_for_scan(str(file))
        run_id, steps, settings, summary = "", [], {}, {}  # type: str, list[int], dict[str, Any], dict[str, Any]
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            run_id = record.run.run_id or run_id
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            values = {item.key or ".".join(item.nested_key) for item in record.history.item}
            if "train_loss" in values:
                steps.append(record.history.step.num)
        runs.append((run_id, steps, settings, summary))
    return runs


def test_wandb_continues_one_run_without_doubled_points(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb")
    config: ExperimentConfig = load_config(path, ["wandb={mode: offline}"])
    with killed_after_logging(step=5):
        train_small(config)
    training = train_small(config)
    evaluate(config, [student_target(config, "small")])
    first, second, evaluation = wandb_runs(tmp_path / "root" / "wandb")
    assert first[0] == second[0] == evaluation[0] == training["tracking_id"]
    assert (evaluation[1], evaluation[3]["heldout_nats_per_token"] > 0) == ([], True)
    assert (first[1], second[1]) == ([1, 2, 3, 4, 5], [6])
    assert first[2]["train"]["learning_rate"] == 0.01
    assert first[2]["tags"]["refined_version"] == "3"
    assert second[3]["final_loss"] == pytest.approx(training["final_loss"])
    runs = connect(config).search_runs(experiment_names=["miniplm"], output_format="list")
    assert [run.info.status for run in runs] == ["FINISHED"]
