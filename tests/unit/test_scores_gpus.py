"""The resources that scoring asks a cluster for, from the session's properties alone."""

from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf.errors import ConfigError
from miniplm_udf.scores import gpus
from miniplm_udf.scores.gpus import scoring_profile


def session(master: str, **conf: str) -> Any:
    properties = {f"spark.{key.replace('_', '.')}": value for key, value in conf.items()}
    found = SimpleNamespace(get=lambda key, default=None: properties.get(key, default))
    return SimpleNamespace(sparkContext=SimpleNamespace(master=master, applicationId="app", getConf=lambda: found))


def test_where_there_is_nothing_to_ask_for() -> None:
    assert scoring_profile(session("spark://host:7077"), 1) is None
    assert scoring_profile(session("local[2]", executor_resource_gpu_amount="1"), 1) is None
    assert scoring_profile(session("yarn", executor_resource_gpu_amount="1"), None) is None


def test_properties_that_would_wait_for_ever_are_refused() -> None:
    shared, own = {"executor_resource_gpu_amount": "1"}, {"miniplm_gpu_amount": "1"}
    with pytest.raises(ConfigError, match=r"dynamic allocation on and spark.executor.resource.gpu.amount set"):
        scoring_profile(session("yarn", dynamicAllocation_enabled="true", **shared), 1)
    with pytest.raises(ConfigError, match=r"dynamic allocation off and spark.miniplm.gpu.amount set"):
        scoring_profile(session("yarn", **own), 1)
    with pytest.raises(ConfigError, match=r"dynamic allocation on"):
        scoring_profile(session("yarn", dynamicAllocation_enabled="true", **shared, **own), 1)


@pytest.mark.parametrize("master", ["local[4]", "spark://host:7077"])
@pytest.mark.parametrize("workers_per_gpu", [1, 2, None])
def test_without_gpus_of_sparks_a_split_model_asks_for_none(master: str, workers_per_gpu: int | None) -> None:
    """The machines may have no GPU; a machine that has GPUs refuses several workers (`workers.model_scorers`)."""
    assert scoring_profile(session(master), workers_per_gpu, "teacher") is None


def test_a_split_model_has_its_gpus_to_itself() -> None:
    with pytest.raises(ConfigError, match=r"score\.workers_per_gpu: expected 1, .*models\.teacher .*found 2"):
        scoring_profile(session("yarn", executor_resource_gpu_amount="4"), 2, "teacher")


@pytest.mark.parametrize(
    ("workers_per_gpu", "split_model", "expected"),
    [(1, None, 1.0), (4, None, 0.25), (1, "teacher", 4.0), (None, "teacher", 4.0)],
)
def test_the_gpus_that_a_task_asks_for(
    monkeypatch: pytest.MonkeyPatch, workers_per_gpu: int | None, split_model: str | None, expected: float
) -> None:
    """Executors have four GPUs."""
    fixed = session("spark://host:7077", executor_resource_gpu_amount="4")
    own = session("yarn", dynamicAllocation_enabled="true", miniplm_gpu_amount="4")
    for each in (fixed, own):
        monkeypatch.setattr(gpus, "_PROFILES", {})
        profile = scoring_profile(each, workers_per_gpu, split_model)
        assert profile is not None
        assert profile.taskResources["gpu"].amount == expected
        if each is own:
            assert profile.executorResources["gpu"].amount == 4
