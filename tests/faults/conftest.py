"""The Spark session of the tests that need no cluster: the same as in tests/spark."""

from tests.support.spark_session import spark as spark
