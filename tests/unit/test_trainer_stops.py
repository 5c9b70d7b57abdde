"""A training that is killed, stopped, or started on ranks that see different folders: what it leaves, how it ends."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.train
from miniplm_udf import stopping
from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.targets import student_target
from tests.support.ranks import run_processes
from tests.support.trainer_process import KillableTraining, check_killed_training, copied, until
from tests.support.trainer_roots import (
    make_root,
    pack,
    packed_metadata,
    some_texts,
    write_config,
    write_packed,
    write_tokenizer,
)
from trainer.__main__ import main
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.records import TrainResult
from trainer.train import train

pytestmark = pytest.mark.slow

STEPS = 120


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_root(folder)
    return folder


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> KillableTraining:
    """A training that nobody disturbed."""
    training = copied(prepared, tmp_path_factory.mktemp("whole"), STEPS)
    training.finish()
    return training


@pytest.mark.long
def test_a_training_that_is_killed_three_times_ends_with_the_same_weights(
    prepared: Path, whole: KillableTraining, tmp_path: Path
) -> None:
    check_killed_training(whole, copied(prepared, tmp_path, STEPS), kills=3)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_saves_and_the_next_start_goes_on(
    prepared: Path, whole: KillableTraining, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    stopped = copied(prepared, tmp_path, STEPS)
    process = stopped.start()
    until(lambda: stopped.newest_step() > 0, process)
    os.kill(process.pid or 0, number)
    process.join()
    log = stopped.log.read_text()
    assert process.exitcode == code, log
    advice = "run the same command again to continue; its last step"
    assert f"miniplm: the training was stopped by {number.name}; {advice}" in log
    assert f'"stopped_after": {stopped.newest_step()}' in log
    assert "Traceback" not in log
    assert not (stopped.folder / "root" / "models" / "small").exists()
    assert [status for status, _ in stopped.runs()] == ["KILLED"]
    stopped.finish()
    assert stopped.log.read_text().count("resuming after step ") == 1
    assert all(torch.equal(value, whole.weights()[name]) for name, value in stopped.weights().items())
    assert stopped.runs() == [("FINISHED", stopped.logged_steps())]


def _train_sharded(folder: Path) -> None:
    config = load_config(
        folder / "experiment.yaml", [*KillableTraining(folder, STEPS).overrides, "train.parallel=fsdp"]
    )
    train(config, student_target(config, "small"))


@pytest.mark.long
def test_a_sharded_training_writes_the_model_folder_of_one_process(
    prepared: Path, whole: KillableTraining, tmp_path: Path
) -> None:
    sharded = copied(prepared, tmp_path, STEPS)
    run_processes(_train_sharded, tmp_path)
    assert sharded.weights().keys() == whole.weights().keys()
    for name, value in whole.weights().items():
        torch.testing.assert_close(sharded.weights()[name], value, atol=1e-3, rtol=0)
    configs = [(run.folder / "root/models/small/config.json").read_text() for run in (sharded, whole)]
    assert configs[0] == configs[1]
    assert sharded.runs() == [("FINISHED", sharded.logged_steps())]


def _stop_after_a_save(training: KillableTraining) -> None:
    while training.newest_step() == 0:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def _train_until_rank_1_is_stopped(folder: Path) -> None:
    """Trains; rank 1 gets SIGTERM once a checkpoint is there. Each rank writes after which step it stopped."""
    rank = int(os.environ["RANK"])
    training = KillableTraining(folder, 2000)
    if rank == 1:
        threading.Thread(target=_stop_after_a_save, args=(training,), daemon=True).start()
    config = training.loaded_config()
    with stopping.stops_on_signals(), stopping.deferred():
        result = train(config, student_target(config, "small"))
    (folder / f"{rank}.json").write_text(json.dumps(result.as_json()))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(prepared: Path, tmp_path: Path) -> None:
    training = copied(prepared, tmp_path, 2000)
    run_processes(_train_until_rank_1_is_stopped, tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1] == {"name": "small", "stopped_after": training.newest_step(), "skipped": False}
    assert 0 < training.newest_step() < 2000


def _run_the_command_until_rank_1_is_stopped(folder: Path) -> None:
    """As above, with the command and two students. Each rank writes the exit code."""
    rank = int(os.environ["RANK"])
    training = KillableTraining(folder, 2000)
    second = folder / "two.yaml"
    if rank == 1:
        threading.Thread(target=_stop_after_a_save, args=(training,), daemon=True).start()
    code = main(["train", "-c", str(second), *training.overrides])
    (folder / f"{rank}.json").write_text(json.dumps(code))


def test_a_signal_to_one_rank_starts_no_further_student(prepared: Path, tmp_path: Path) -> None:
    training = copied(prepared, tmp_path, 2000)
    config = json.loads(training.config.read_text())
    config["students"]["next"] = config["students"]["small"]
    (tmp_path / "two.yaml").write_text(json.dumps(config))
    run_processes(_run_the_command_until_rank_1_is_stopped, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [0, 0]
    assert 0 < training.newest_step() < 2000
    assert not (tmp_path / "root" / "_checkpoints" / "train" / "next").exists()


def _train_two_students(folder: Path) -> None:
    """Runs the command with two students; rank 0 is late after each, as it is with large models."""
    rank = int(os.environ["RANK"])
    train_on_time = trainer.train.train

    def train_late(*arguments: Any, **options: Any) -> TrainResult:
        result = train_on_time(*arguments, **options)
        time.sleep(1.5 if rank == 0 else 0)
        return result

    trainer.train.train = train_late  # type: ignore[assignment]
    code = main(["train", "-c", str(folder / "two.yaml"), *KillableTraining(folder, STEPS).overrides, "train.steps=4"])
    (folder / f"{rank}.json").write_text(json.dumps(code))


def test_two_ranks_train_two_students_one_after_the_other(prepared: Path, tmp_path: Path) -> None:
    training = copied(prepared, tmp_path, STEPS)
    config = json.loads(training.config.read_text())
    config["students"]["next"] = config["students"]["small"]
    (tmp_path / "two.yaml").write_text(json.dumps(config))
    run_processes(_train_two_students, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [0, 0]
    first, second = (load_file(tmp_path / "root" / "models" / name / "model.safetensors") for name in ("small", "next"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def _train_until_the_disk_is_full(folder: Path) -> None:
    config = KillableTraining(folder, STEPS).loaded_config()
    save = Checkpoints._write

    def write(self: Checkpoints, staging: Path, state: SavedState, tensors: Any) -> None:
        if state.steps_done == 6:
            raise OSError(28, "No space left on device")
        save(self, staging, state, tensors)

    Checkpoints._write = write  # type: ignore[method-assign]
    train(config, student_target(config, "small"))


def test_a_full_disk_in_a_save_stops_both_ranks(prepared: Path, tmp_path: Path) -> None:
    training = copied(prepared, tmp_path, STEPS)
    run_processes(_train_until_the_disk_is_full, tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert "step-6: cannot be written (No space left on device" in first
    assert "step-3 is whole, and the same command resumes from it" in first
    assert second.startswith("another rank failed, and its message says why")
    assert training.newest_step() == 3
    assert not training.is_saving()
    assert [status for status, _ in training.runs()] == ["FAILED"]


def _train_in_own_folder(folder: Path) -> None:
    rank = os.environ["RANK"]
    folder = folder / f"rank{rank}"
    extra = (folder / "overrides.txt").read_text().split() if (folder / "overrides.txt").exists() else []
    uri = f"mlflow.tracking_uri=sqlite:///{folder}/root/mlflow.db"
    config = load_config(folder / "experiment.yaml", [uri, *extra])
    train(config, student_target(config, "small"))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under a folder, without those that the test itself writes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def other_rows(root: Path) -> None:
    shutil.rmtree(root / "tables" / "packed" / "kept" / "bpe")
    tokenizer = write_tokenizer(root / "again")
    metadata = packed_metadata(root / "models" / "tokenizer_bpe")
    write_packed(root / "tables" / "packed" / "kept" / "bpe", *pack(tokenizer, some_texts(15)), metadata)
    shutil.rmtree(root / "again")


CHECKPOINTS = "_checkpoints/train/small"
DIFFERENCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda root: shutil.rmtree(root / "tables" / "packed"), "rank 1: "),
    "other rows": (other_rows, "rank 1 and rank 0 see different config, packed table ("),
    "no checkpoint": (lambda root: shutil.rmtree(root / CHECKPOINTS), "rank 1 and rank 0 see different checkpoints "),
    "older": (
        lambda root: shutil.rmtree(root / CHECKPOINTS / "step-4"),
        "rank 1 and rank 0 see different checkpoints ",
    ),
    "damaged": (
        lambda root: (root / CHECKPOINTS / "step-4" / "state.pt").write_bytes(b"cut"),
        "rank 1 and rank 0 see different checkpoints ",
    ),
    "settings": (
        lambda root: (root.parent / "overrides.txt").write_text("train.save_every_steps=3"),
        "rank 1 and rank 0 see different sections train of the config",
    ),
}


@pytest.fixture(scope="module")
def stopped_after_four_steps(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with checkpoints of the steps 2 and 4 of a training of 6."""
    folder = tmp_path_factory.mktemp("stopped") / "rank0"
    shutil.copytree(prepared, folder)
    uri = f"sqlite:///{folder}/root/mlflow.db"
    config = load_config(write_config(folder, folder / "root"), [f"mlflow.tracking_uri={uri}"])
    train(config, student_target(config, "small"))
    checkpoints = folder / "root" / CHECKPOINTS
    shutil.rmtree(folder / "root" / "models" / "small")
    shutil.rmtree(checkpoints / "step-6")
    return folder


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_with_different_folders_train_nothing(
    stopped_after_four_steps: Path, tmp_path: Path, difference: str
) -> None:
    for rank in range(2):
        folder = tmp_path / f"rank{rank}"
        shutil.copytree(stopped_after_four_steps, folder)
        write_config(folder, folder / "root")
    change, message = DIFFERENCES[difference]
    change(tmp_path / "rank1" / "root")
    before = contents(tmp_path)
    run_processes(_train_in_own_folder, tmp_path)
    assert (tmp_path / "0.txt").read_text().startswith(message)
    assert (tmp_path / "1.txt").read_text().startswith(message.removeprefix("rank 1: "))
    assert contents(tmp_path) == before
