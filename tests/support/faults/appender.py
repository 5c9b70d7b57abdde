"""A writer of a race: `python -m tests.support.faults.appender KIND NUMBER TABLE`, KIND as in `WRITERS`.

Appends to a Delta table one row a commit, from the first line on stdin until stdin is closed. Output: a line "ready" on
stdout, then the id of each row, after its commit has returned. Retries nothing: the error of a commit ends the process.
"""

import os
import select
import sys
from collections.abc import Callable

# The log store of a Spark writer, or the writer that is not Spark.
WRITERS = {
    "spark": "miniplm.s3.ConditionalPutLogStore",
    "spark, Delta's own log store": "io.delta.storage.S3SingleDriverLogStore",
    "delta-rs": None,
}
ROWS_A_WRITER = 1_000_000


def spark_append(table: str, log_store: str) -> Callable[[int], None]:
    from jobs.session import make_session
    from miniplm_udf.config.experiment import ExperimentConfig
    from miniplm_udf.config.spark import SparkConfig
    from tests.support.short_lived import SMALL_TABLES

    conf = {"spark.driver.memory": "1g", "spark.delta.logStore.s3a.impl": log_store, **SMALL_TABLES}
    spark = make_session(ExperimentConfig(root=table, spark=SparkConfig(master="local[1]", conf=conf)), "appender")
    return lambda row: spark.range(row, row + 1, 1, 1).write.format("delta").mode("append").save(table)


def delta_rs_append(table: str) -> Callable[[int], None]:
    import pyarrow as pa
    from deltalake import write_deltalake

    # delta-rs finds the server by the environment variables that the parent process has set.
    return lambda row: write_deltalake(table, pa.table({"id": pa.array([row], pa.int64())}), mode="append")


def main() -> None:
    kind, number, table = sys.argv[1:]
    log_store = WRITERS[kind]
    append = spark_append(table, log_store) if log_store else delta_rs_append(table)
    print("ready", flush=True)
    sys.stdin.readline()
    row = int(number) * ROWS_A_WRITER
    while not select.select([sys.stdin], [], [], 0)[0]:
        append(row)
        print(row, flush=True)
        row += 1
    # The end of a JVM takes seconds, and nothing is left to do.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
