"""A training in this process that dies at a chosen point, for the tests of what its next start continues."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.targets import student_target
from trainer.tracking.run import Run
from trainer.train import train


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


@contextlib.contextmanager
def killed_after_logging(step: int) -> Iterator[None]:
    """A block whose training dies right after the metrics of a step were logged."""
    original = Run.log_metrics

    def log_and_die(self: Run, metrics: dict[str, float], step_of_metrics: int | None = None, **named: Any) -> None:
        number = named.get("step", step_of_metrics)
        original(self, metrics, step=number)
        if number == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log_metrics", log_and_die)
        try:
            yield
        except Killed:
            return
    pytest.fail(f"the training did not log step {step}")


def train_small(config: ExperimentConfig, **options: Any) -> dict[str, Any]:
    """Trains the student `small`; returns its result as JSON."""
    return train(config, student_target(config, "small"), **options).as_json()
