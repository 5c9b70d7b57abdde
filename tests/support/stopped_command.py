"""A `miniplm` command that a test sends signals to: `python -m tests.support.stopped_command WORK ROOT`.

WORK: `batch`, a Spark job that takes a minute a row; `ingest`, the query of that stage, in two micro-batches, with
stand-ins for models. Prints "at work" when the work begins. Ends as the command does.
"""

import sys
from pathlib import Path
from typing import Any

from jobs import ingest
from jobs.command import guarded
from jobs.session import make_session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from tests.support.faults import experiment
from tests.support.faults.driver import stand_ins


def slowly(batches: Any) -> Any:
    import time

    for batch in batches:
        time.sleep(60)
        yield batch


def batch(spark: Any, root: Path) -> None:
    spark.range(4).mapInArrow(slowly, "id bigint").count()


def ingest_files(spark: Any, root: Path) -> None:
    experiment.write_input(root / "inbox")
    config = experiment.config(root, root / "inbox")
    with stand_ins():
        ingest.run(spark, config)


def main() -> int:
    work, root = sys.argv[1], Path(sys.argv[2])

    def body() -> int:
        spark = make_session(
            ExperimentConfig(root=str(root), spark=SparkConfig(master="local[2,4]")), "stopped command"
        )
        print(f"java {spark.sparkContext._gateway.proc.pid}", flush=True)
        try:
            print("at work", flush=True)
            {"batch": batch, "ingest": ingest_files}[work](spark, root)
        finally:
            spark.stop()
        return 0

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
