"""Fetches the jars of Delta and of S3 by their Maven coordinates into the folder of jars of this machine's cache.

Starts a Spark session, which fetches what is missing, and stops it. Used when the image of executors is built; also for
a machine that has no network later. Ends with exit code 1 if a jar is missing afterwards.
"""

import sys

from pyspark.sql import SparkSession

from jobs.spark_jars import jar_properties, missing_jars


def main() -> int:
    """Fetches the jars; returns the exit code."""
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    for key, value in jar_properties(with_s3=True, given={}).items():
        builder = builder.config(key, value)
    builder.getOrCreate().stop()
    missing = missing_jars(with_s3=True)
    print(f"missing jars: {missing or 'none'}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
