"""For all tests: drivers are short-lived, torch uses one thread, and a module's experiments log to stores of their own.

Two tests run at a time on two cores, so a second thread of torch takes a core from the other test, and waits for work
in a loop. Also, bit-identical weights need the same number of threads. The processes that tests start inherit both.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support import s3_server
from tests.support.short_lived import JAVA_OPTIONS
from tests.support.tracking_store import own_tracking_store

os.environ.setdefault("SPARK_SUBMIT_OPTS", JAVA_OPTIONS)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, by the test modules
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background without Ctrl-C, and the programs that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def tracking_store() -> Iterator[None]:
    with own_tracking_store():
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[s3_server.S3Server]:
    """An S3 server on loopback with the bucket `s3_server.BUCKET`, which this process and its children reach."""
    with s3_server.running() as server:
        yield server
