"""The Spark session of the tests that need no cluster."""

from tests.spark.conftest import spark

__all__ = ["spark"]
