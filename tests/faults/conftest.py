"""The Spark session of the tests that need no cluster: the one of tests/spark, set for tables of a few rows."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.standalone import SMALL_TABLES
from tests.spark.conftest import spark as shared_session

__all__ = ["shared_session"]


@pytest.fixture(scope="module")
def spark(shared_session: Any) -> Iterator[Any]:
    before = {key: shared_session.conf.get(key, None) for key in SMALL_TABLES}
    for key, value in SMALL_TABLES.items():
        shared_session.conf.set(key, value)
    yield shared_session
    for key, old in before.items():
        shared_session.conf.unset(key) if old is None else shared_session.conf.set(key, old)
