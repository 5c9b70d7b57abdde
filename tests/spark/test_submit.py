"""What spark-submit is given wins over the config and over the defaults of a session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyspark

from jobs.session import delta_jars
from tests.support.short_lived import JAVA_OPTIONS
from tests.support.spark_session import REPOSITORY


def test_master_and_properties_of_spark_submit_win(tmp_path: Path) -> None:
    given = {"spark.sql.shuffle.partitions": "7", "spark.sql.debug.maxToStringFields": "11"}
    properties = given | {"spark.driver.extraJavaOptions": JAVA_OPTIONS, **delta_jars()}
    expected = given | {
        "spark.master": "local[1]",
        "spark.sql.autoBroadcastJoinThreshold": "5",  # of the config
        "spark.sql.session.timeZone": "UTC",  # a default
    }
    environment = {"PYTHONPATH": str(REPOSITORY), "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    options = [part for key, value in properties.items() for part in ("--conf", f"{key}={value}")]
    done = subprocess.run(
        [
            *(Path(pyspark.__file__).parent / "bin/spark-submit", "--master", "local[1]", *options),
            *(REPOSITORY / "tests/support/submitted_job.py", tmp_path / "answer.json", tmp_path / "root", *expected),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "answer.json").read_text()) == expected
