"""The gain from the first half of a text: measured once for each model, by the scorers, and kept in its record."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from jobs import score
from miniplm_udf.scores import halves
from miniplm_udf.scores.models import describe_models, model_configs
from miniplm_udf.scores.run import prepare
from miniplm_udf.store import context_gains
from tests.support.score_tables import (
    FakeFactory,
    experiment,
    fake_nll,
    scored_texts,
    texts,
    two_models,
    write_instances,
)

SCALES = {"teacher": 1.0, "reference": 2.0}


def gain(text: str, scale: float) -> float:
    first = text[: len(text) // 2]
    rest = fake_nll(text, scale) - fake_nll(first, scale)
    return fake_nll(first, scale) / len(first) - rest / (len(text) - len(first))


@pytest.mark.long
def test_the_gain_is_measured_once_and_stays_in_the_record(spark: Any, tmp_path: Path) -> None:
    config = experiment(tmp_path / "root", two_models(tmp_path))
    # The second half has larger bytes than the first, so the gain is not 0. The short text is not measured.
    long = [f"{number} " + "a" * 200 + "z" * 200 for number in range(5)]
    write_instances(spark, config, [*long, *texts(1, words=5)])
    log = tmp_path / "calls.log"
    factories = {alias: FakeFactory(scale, str(log)) for alias, scale in SCALES.items()}
    score.run(spark, config, factories)
    assert context_gains.read(config, SCALES) == {}
    plan = prepare(spark, config, "run", factories).plan
    gains = halves.measure_gains(spark, config, plan)
    assert gains == {alias: pytest.approx(fmean(gain(text, scale) for text in long)) for alias, scale in SCALES.items()}
    assert gains["teacher"] < -0.1
    n_scored = len(scored_texts(log, 1.0))
    # Another description of the models, and another measurement, change nothing and score nothing.
    describe_models(spark, config, model_configs(config))
    assert context_gains.read(config, SCALES) == gains
    assert halves.measure_gains(spark, config, plan) == {}
    assert len(scored_texts(log, 1.0)) == n_scored == 6 + 5
