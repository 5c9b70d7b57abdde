"""The Spark session of the tests that need no cluster: the one of tests/spark."""

from tests.spark.conftest import spark as spark
