"""The JVM of a command, and signals: Python alone decides how a command ends. Driver only.

SIGTERM reaches the whole process group (`timeout`, a scheduler) or the whole control group (systemd). A JVM that obeyed
it would end during the running micro-batch, so a JVM that pyspark started ignores it. The driver ends that JVM, by
`end_java` or because its stdin closes, which also happens after a kill -9 of the driver. Under spark-submit Java starts
Python, and Java handles the signals.
"""

import contextlib
import logging
import os
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def leave_signals_to_python(session: "SparkSession") -> None:
    """Makes the JVM ignore SIGTERM. It ignores SIGINT already, because pyspark starts it that way.

    Args:
        session: the command's session. Nothing is done if its JVM started Python, as spark-submit does.
    """
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        return  # Python is stopped by the JVM that started it
    java = session.sparkContext._jvm
    assert java is not None
    java.sun.misc.Signal.handle(java.sun.misc.Signal("TERM"), java.sun.misc.SignalHandler.SIG_IGN)


def waits_for_java(frame: FrameType | None) -> bool:
    """Whether this frame runs inside a call to Java.

    Args:
        frame: the frame that a signal interrupted; None if there is none.
    """
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("py4j."):
            return True
        frame = frame.f_back
    return False


def end_java() -> None:
    """Silences the JVM, cancels its jobs, and ends it if pyspark started it. Running calls to it then fail."""
    from pyspark import SparkContext

    gateway, context = SparkContext._gateway, SparkContext._active_spark_context
    process = getattr(gateway, "proc", None)
    for name in ("py4j", "py4j.clientserver", "py4j.java_gateway"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        if context is not None:
            # This handler prints a trace when Java is gone.
            context._accumulatorServer.handle_error = lambda *_: None
            # The main thread may stop the context at the same time.
            with contextlib.suppress(Exception):
                context.setLogLevel("OFF")
                context.cancelAllJobs()
    finally:
        if process is not None:
            process.stdin.close()
