"""The Spark session of the tests of benchmarks: the same as in tests/spark."""

from tests.support.spark_session import spark as spark
