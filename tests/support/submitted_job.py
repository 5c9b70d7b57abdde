"""Starts a session as a job does and writes its settings to a file: run by spark-submit in test_submit.py.

Arguments: the file, the root, and the names of the settings. `level of Java's log` is the root logger's.
"""

import json
import sys
from pathlib import Path

from jobs.session import spark_session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig

if __name__ == "__main__":
    answer, root, *names = sys.argv[1:]
    own = {"spark.sql.shuffle.partitions": "3", "spark.sql.autoBroadcastJoinThreshold": "5"}
    config = ExperimentConfig(root=root, spark=SparkConfig(master="local[2]", conf=own))
    with spark_session(config, "submitted") as session:
        logger = session._jvm.org.apache.logging.log4j.LogManager.getRootLogger()
        levels = {"level of Java's log": str(logger.getLevel())}
        settings = {name: levels[name] if name in levels else session.conf.get(name) for name in names}
        Path(answer).write_text(json.dumps(settings))
