"""Runs of several models under a parent: five students of a sweep, a resumed child, processes that start at once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.tracking import MlflowConfig
from miniplm_udf.errors import ConfigError
from tests.support.killed_training import killed_after_logging, train_small
from tests.support.trainer_roots import make_root, write_config
from trainer.__main__ import main
from trainer.scaling.runs import read_runs
from trainer.tracking import parent_runs
from trainer.tracking.run import tracked_run
from trainer.tracking.store import connect

pytestmark = pytest.mark.slow

RATES = {"lr1": 0.001, "lr2": 0.002, "lr3": 0.003, "lr4": 0.004, "lr5": 0.005}
SWEEP = "mlflow.parent_run=learning rates"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A config whose five students differ in the learning rate, with a root."""
    make_root(tmp_path)
    path = write_config(tmp_path, tmp_path / "root", steps=4)
    raw = json.loads(path.read_text())
    small = raw["students"]["small"]
    raw["students"] |= {name: {**small, "train": {"learning_rate": rate}} for name, rate in RATES.items()}
    path.write_text(json.dumps(raw))
    return path


def runs_by_name(config: ExperimentConfig) -> dict[str, Any]:
    client = connect(config).MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("miniplm").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(by_name) == len(runs)
    return by_name


def test_five_students_are_children_of_one_parent_and_a_resumed_child_stays_one(path: Path) -> None:
    students = [word for name in RATES for word in ("--student", name)]
    assert main(["train", "-c", str(path), *students, SWEEP]) == 0
    config = load_config(path, [SWEEP])
    with killed_after_logging(step=3):
        train_small(config)
    parent = runs_by_name(config)["learning rates"]
    assert parent.info.status == "FAILED"  # as its child
    train_small(config)
    runs = runs_by_name(config)
    assert set(runs) == {*RATES, "small", "learning rates"}
    parent = runs.pop("learning rates")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {name: float(runs[name].data.params["train.learning_rate"]) for name in RATES} == RATES
    assert "mlflow.parentRunId" not in parent.data.tags
    assert (parent.info.status, parent.data.params, parent.data.metrics) == ("FINISHED", {}, {})
    # Scaling laws read the students' runs, and the parent does not disturb them.
    read = read_runs(config, list(RATES), "train_loss")
    assert {name: each.run_ids for name, each in read.items()} == {name: (runs[name].info.run_id,) for name in RATES}


@pytest.mark.parametrize("name", ["small", "teacher", "comparison", "it's"])
def test_a_parent_has_a_name_of_its_own(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^mlflow\.parent_run: |mlflow\.parent_run: "):
        load_config(path, [f"mlflow.parent_run={name}"])


class Client:
    """A store in which another process creates the parent between a search and a creation."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []
        self.deleted: list[str] = []

    def search_runs(self, experiments: list[str], condition: str, order_by: list[str]) -> list[SimpleNamespace]:
        return [run for run in self.runs if run.info.run_id not in self.deleted]

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        for run_id in ("theirs", "mine"):
            self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id=run_id), data=SimpleNamespace(tags={})))
        return self.runs[-1]

    def delete_run(self, run_id: str) -> None:
        self.deleted.append(run_id)

    def update_run(self, run_id: str, status: str) -> None:
        assert status == "RUNNING"


def test_processes_that_start_at_once_share_the_older_parent() -> None:
    client = Client()
    assert parent_runs.find_or_create(client, "0", "sweep") == "theirs"
    assert client.deleted == ["mine"]
    assert parent_runs.find_or_create(client, "0", "sweep") == "theirs"


def test_a_parent_runs_until_its_last_child_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = connect(ExperimentConfig(root=str(tmp_path), mlflow=MlflowConfig())).MlflowClient()
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    parent = parent_runs.find_or_create(client, experiment, "sweep")
    first, second = (client.create_run(experiment, tags=parent_runs.tag(parent)).info.run_id for _ in range(2))
    statuses = []
    for child, status in ((first, "FINISHED"), (second, "KILLED"), (second, "FINISHED")):
        client.set_terminated(child, status)
        parent_runs.end(client, experiment, parent)
        statuses.append(client.get_run(parent).info.status)
    assert statuses == ["RUNNING", "KILLED", "FINISHED"]
    # A child of the same name is no parent.
    client.set_tag(parent, "mlflow.parentRunId", first)
    assert parent_runs.find_or_create(client, experiment, "sweep") != parent


def test_two_parents_become_one_when_their_children_end(tmp_path: Path) -> None:
    config = ExperimentConfig(root=str(tmp_path), mlflow=MlflowConfig(parent_run="sweep"))
    client = connect(config).MlflowClient()
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    with tracked_run(config, "first"):
        # Another process did not see the parent of this one, and its clock is behind.
        older = client.create_run(experiment, start_time=1, run_name="sweep").info.run_id
        with tracked_run(config, "second"):
            pass
    runs = runs_by_name(config)
    assert runs["sweep"].info.run_id == older
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("first", "second")} == {older}
    assert runs["sweep"].info.status == "FINISHED"
