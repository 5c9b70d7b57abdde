"""Evaluates a model while it trains, on the held-out and the external sets, from a copy of its weights.

Input: the weights of this moment, as the folder of a finished model. Output: the numbers of a finished model's
evaluation, by their names in MLflow with `during_training/` in front. The training goes on as if there had been no
evaluation: its model is not used, and the state of every random generator is put back. Runs on rank 0, while the other
ranks wait. Writes only a temporary folder.
"""

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.targets import Target
from miniplm_udf.errors import ConfigError, MiniplmError, reason
from miniplm_udf.store.model_records import Evaluation
from trainer.evaluation.losses import EvaluatedModel
from trainer.evaluation.records import metrics
from trainer.evaluation.texts import evaluation_sets


class TrainingEvaluation:
    """The evaluation of one training.

    Args:
        config: the experiment.
        target: the model that trains.

    Raises:
        ConfigError: there is nothing to evaluate on, or an external set is missing or lacks the text column.
        CorpusError: there is no held-out text, or a file of an external set cannot be read.
    """

    def __init__(self, config: ExperimentConfig, target: Target):
        self._config, self._target = config, target
        self._sets = evaluation_sets(config)
        if not self._sets:
            raise ConfigError(
                "train.evaluate_every_steps: expected a text to evaluate on, found none; set evaluate.inputs or an "
                "ingest.split.heldout above 0, or set train.evaluate_every_steps=0"
            )

    def measure(self, write_model: Callable[[Path], object]) -> dict[str, float]:
        """Evaluates the weights of this moment.

        Args:
            write_model: writes the weights into a folder, as a finished model's folder has them.

        Returns:
            Losses in nats or bits, by their names in MLflow.

        Raises:
            CorpusError: a file of an external set cannot be read, or no text of a set can be scored.
            MiniplmError: the temporary folder cannot be written, for example because the disk is full.
        """
        with _kept_random_state(), tempfile.TemporaryDirectory() as folder:
            try:
                write_model(Path(folder))
            except (OSError, SafetensorError) as error:
                raise MiniplmError(
                    f"train.evaluate_every_steps: the weights cannot be written to {tempfile.gettempdir()} "
                    f"({reason(error)}): free space there, or set TMPDIR; the same command resumes from the last "
                    "checkpoint"
                ) from error
            # torch.compile would take longer than the evaluation of a small set.
            model = EvaluatedModel(self._config, self._target, folder, self._target.sequence_length, compiled=False)
            evaluation = Evaluation(sets={texts.name: model.score(texts) for texts in self._sets})
        return {f"during_training/{name}": value for name, value in metrics(evaluation).items()}


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Puts back the state of Python's, numpy's and torch's random generators, on all devices."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
