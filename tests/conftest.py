"""For all tests: JVMs that live for a minute are not worth the second compiler's work (a third of the tests' time)."""

import os

os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")
