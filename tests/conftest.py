"""For all tests: drivers are short-lived, and a module's experiments log to stores that no other module sees."""

import os
from collections.abc import Iterator

import pytest

from tests.support.short_lived import JAVA_OPTIONS
from tests.support.tracking_store import own_tracking_store

os.environ.setdefault("SPARK_SUBMIT_OPTS", JAVA_OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def tracking_store() -> Iterator[None]:
    with own_tracking_store():
        yield
