"""Settings given to spark-submit win over the config and over the defaults of a session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

from jobs.spark_jars import jar_properties
from tests.support.short_lived import JAVA_OPTIONS
from tests.support.spark_session import REPOSITORY


@pytest.mark.parametrize(("options", "master"), [(["--master", "local[1]"], "local[1]"), ([], "local[2]")])
def test_master_and_properties_of_spark_submit_win(tmp_path: Path, options: list[str], master: str) -> None:
    """Without --master, spark-submit sets `local[*]`, which counts as not given."""
    submitted = {"spark.sql.shuffle.partitions": "7", "spark.log.level": "WARN"}
    properties = submitted | {"spark.driver.extraJavaOptions": JAVA_OPTIONS, **jar_properties(with_s3=False, given={})}
    expected = submitted | {
        "spark.master": master,
        "spark.sql.autoBroadcastJoinThreshold": "5",  # of the config
        "spark.sql.session.timeZone": "UTC",  # a default
        "level of Java's log": "WARN",
    }
    environment = {"PYTHONPATH": str(REPOSITORY), "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    options = [*options, *(part for key, value in properties.items() for part in ("--conf", f"{key}={value}"))]
    completed = subprocess.run(
        [
            *(Path(pyspark.__file__).parent / "bin/spark-submit", *options),
            *(REPOSITORY / "tests/support/submitted_job.py", tmp_path / "answer.json", tmp_path / "root", *expected),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert json.loads((tmp_path / "answer.json").read_text()) == expected
