"""Scores with a fake model by spark-submit, on workers that have the package from a wheel: run by test_packaged.py.

Arguments: a root, and a file for the answer: what the workers' Python can import, and where from. The fake scorer
comes to the workers in `packaged_fake.py`, by --py-files; nothing of the repository does.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaged_fake import PackagedFactory, describe, instance_rows

from jobs import score
from jobs.session import make_session
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scores import run as scores_run
from miniplm_udf.store import tables


def worker_paths(batches: Iterator[Any]) -> Iterator[Any]:
    """Where a worker finds the package, and all that is on its path."""
    import os
    import sys

    import pyarrow as pa

    import miniplm_udf

    for _ in batches:
        found = {
            "package": miniplm_udf.__file__, "python": sys.executable, "path": sys.path,
            "environment": [value for value in os.environ.values() if "/" in value],
        }  # fmt: skip
        yield pa.RecordBatch.from_pydict({"found": [json.dumps(found)]})


def main() -> None:
    root, answer = sys.argv[1:]
    config = ExperimentConfig(
        root=root, models={"teacher": ModelConfig(path="fake", document_separator="<s>")}, score=ScoreConfig(workers=2)
    )
    spark = make_session(config, "packaged")

    def described(session: Any, of: ExperimentConfig, models: dict[str, Any]) -> dict[str, Any]:
        storage.write_json(of.layout.model_record("teacher"), describe().to_dict())
        return {"teacher": describe()}

    scores_run.describe_models = described
    instances = spark.createDataFrame(instance_rows(), schemas.INSTANCES.spark_schema())
    tables.append(instances, config.layout.table("instances"), schemas.INSTANCES)
    paths = [json.loads(row[0]) for row in spark.range(0, 2, 1, 2).mapInArrow(worker_paths, "found string").collect()]
    summary = score.run(spark, config, {"teacher": PackagedFactory()})
    Path(answer).write_text(json.dumps({"workers": paths, "scored": summary.scored}))
    spark.stop()


if __name__ == "__main__":
    main()
