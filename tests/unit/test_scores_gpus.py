"""The resources that scoring asks a cluster for, from the session's properties alone."""

from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf.errors import ConfigError
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
