"""A reference that has learned too little is named before the corpus is scored with it."""

import math
from pathlib import Path

import pytest

from jobs.reference import weakness
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from tests.support.model_records import write_training

N_IDS = 49_152


@pytest.mark.parametrize(
    ("loss", "is_weak"), [(math.log(N_IDS), True), (8.07, True), (5.58, False), (2.0, False), (None, False)]
)
def test_a_loss_that_is_hardly_better_than_guessing_is_named(loss: float | None, is_weak: bool, tmp_path: Path) -> None:
    """8.07 and 5.58 are losses of references whose differences were useless, and useful."""
    config = ExperimentConfig(root=f"file://{tmp_path}")
    write_training(config, "reference", final_loss=loss)
    storage.write_json(config.layout.model("reference", "config.json"), {"vocab_size": N_IDS})
    warning = weakness(config, "reference")
    assert (warning is not None) is is_weak
    if warning is not None:
        assert f"its loss is {loss:.2f} nats/token" in warning
        assert "guessing has 10.80" in warning


def test_a_model_without_records_is_not_judged(tmp_path: Path) -> None:
    assert weakness(ExperimentConfig(root=f"file://{tmp_path}"), "reference") is None
