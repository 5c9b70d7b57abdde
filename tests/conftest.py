"""For all tests: drivers are short-lived."""

import os

from tests.support.short_lived import JAVA_OPTIONS

os.environ.setdefault("SPARK_SUBMIT_OPTS", JAVA_OPTIONS)
