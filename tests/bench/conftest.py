"""The Spark session of tests/spark, for the tests of benchmarks."""

from tests.spark.conftest import spark as spark
