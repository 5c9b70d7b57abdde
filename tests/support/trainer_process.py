"""Trainings of some hundred steps in processes of their own, to be killed or stopped, and what they leave.

The processes are forked from one process that has imported everything: importing torch, transformers and MLflow takes
as long as several of these trainings.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from tests.support.ranks import PRELOAD
from tests.support.trainer_roots import write_config
from trainer.__main__ import main
from trainer.tracking.store import connect

LOG_EVERY, SAVE_EVERY = 5, 3
_PATIENCE_SECONDS = 120.0


def _main(arguments: Sequence[str], log: Path) -> None:
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    os._exit(main(arguments))


def copied(prepared: Path, folder: Path, steps: int) -> "KillableTraining":
    """A training in a copy of a prepared root."""
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return KillableTraining(folder, steps)


class KillableTraining:
    """A training of `steps` steps that begins in one process and goes on in the next."""

    def __init__(self, folder: Path, steps: int, tracking_uri: str | None = None) -> None:
        self.folder, self.steps, self.log = folder, steps, folder / "trainer.log"
        self.checkpoints = folder / "root" / "_checkpoints" / "train" / "small"
        self.train = {
            "steps": steps,
            "log_every_steps": LOG_EVERY,
            "save_every_steps": SAVE_EVERY,
            "learning_rate": 0.001,
        }
        self.config = write_config(folder, folder / "root", **self.train)
        # MLflow sets the environment variable of the same meaning for the whole process.
        self.overrides = [f"mlflow.tracking_uri={tracking_uri or f'sqlite:///{folder}/root/mlflow.db'}"]
        self.arguments = ["train", "-c", str(self.config), "--student", "small", *self.overrides]

    def loaded_config(self) -> ExperimentConfig:
        return load_config(self.config, self.overrides)

    def start(self) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=_main, args=(self.arguments, self.log))
        process.start()
        return process

    def newest_step(self) -> int:
        """The newest whole checkpoint; 0 if there is none."""
        names = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max(map(int, names), default=0)

    def is_saving(self) -> bool:
        return any(self.checkpoints.glob(".step-*.tmp"))

    def finish(self) -> None:
        """Runs the training to its end."""
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "root" / "models" / "small" / "model.safetensors")

    def runs(self) -> list[tuple[str, set[int]]]:
        """Status and steps of the curve of each MLflow run."""
        client = connect(self.loaded_config()).MlflowClient()
        runs = client.search_runs([client.get_experiment_by_name("miniplm").experiment_id])
        histories = [client.get_metric_history(run.info.run_id, "train_loss") for run in runs]
        return [
            (run.info.status, {point.step for point in points}) for run, points in zip(runs, histories, strict=True)
        ]

    def logged_steps(self) -> set[int]:
        return {*range(LOG_EVERY, self.steps, LOG_EVERY), self.steps}


def until(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Waits for a condition while the process lives; a process without progress is killed by the caller's failure."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "the training makes no progress"
        time.sleep(0.001)


def kill_at_random(training: KillableTraining, draw: random.Random, moment: str) -> bool:
    """Starts the training and kills it after at most some 30 steps; whether it died while it wrote a checkpoint.

    Args:
        training: the training.
        draw: makes the moment random.
        moment: `save`, `step` or `start`, which may be before the first step; `end`: after the last checkpoint, while
            the model is written and MLflow's run is ended.
    """
    process, first = training.start(), training.newest_step()
    wanted = training.steps if moment == "end" else first + draw.randint(1, 8)
    if moment == "start":
        time.sleep(draw.random() * 2)
    else:
        until(lambda: training.newest_step() >= wanted, process)
    if moment == "save":
        until(training.is_saving, process)
        time.sleep(draw.random() * 0.005)
    elif moment == "step":
        time.sleep(draw.random() * 0.1)
    assert process.is_alive(), f"the training ended before it was killed:\n{training.log.read_text()}"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return training.is_saving()


def check_killed_training(whole: KillableTraining, killed: KillableTraining, kills: int) -> int:
    """Kills a training again and again, and compares it with one that nobody killed; returns the kills in a save."""
    draw = random.Random(kills)
    moments = ("save", "step", "save", "start")
    in_saves = sum(kill_at_random(killed, draw, moments[number % 4]) for number in range(kills - 1))
    assert 0 < killed.newest_step() < killed.steps
    kill_at_random(killed, draw, "end")
    killed.finish()
    expected = whole.weights()
    assert killed.weights().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in killed.weights().items())
    assert killed.runs() == whole.runs() == [("FINISHED", whole.logged_steps())]
    return in_saves
