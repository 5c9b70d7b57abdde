"""Starts the torch trainer as a process of its own: no torch on the Spark driver, no JVM in the trainer.

The child's log goes to this process's stderr, its exit code is passed on; what it prints is in its model's JSON files
anyway. A killed child leaves its checkpoints, and the same command resumes from them. Driver only.
"""

import ctypes
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

from miniplm_udf.errors import EXIT_BAD_CONFIG, ConfigError, MiniplmError

LOGGER = logging.getLogger("miniplm.jobs")

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the child: asks Linux for a SIGTERM when this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_trainer(command: str, config_path: str, overrides: Sequence[str], *options: str) -> None:
    """Runs `python -m trainer COMMAND` to its end.

    Raises:
        ConfigError: the trainer refused the config (it has said why on stderr).
        MiniplmError: the trainer failed.
    """
    line = [sys.executable, "-m", "trainer", command, "-c", config_path, *options, *overrides]
    LOGGER.info("starting the trainer: %s", " ".join([command, *options]))
    # An orphan would write the checkpoints that the next run's trainer writes.
    code = subprocess.run(line, stdout=subprocess.DEVNULL, check=False, preexec_fn=_end_with_parent).returncode
    if code == EXIT_BAD_CONFIG:
        raise ConfigError(f"the trainer refused `{command} {' '.join(options)}`: see its message above")
    if code != 0:
        raise MiniplmError(
            f"the trainer ended `{command} {' '.join(options)}` with code {code}: see its log above; "
            "the same command resumes from the last checkpoint"
        )
