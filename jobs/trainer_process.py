"""Starts the torch trainer as a process of its own: no torch on the Spark driver, no JVM in the trainer.

Input: a trainer command and its options; output: the model folders that the trainer writes. The trainer's log goes to
the stderr of this process; its stdout only tells whether a signal stopped a training, because the model's JSON files
hold the rest. A killed trainer leaves its checkpoints, and the same command continues from them. Driver only.
"""

import ctypes
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

from miniplm_udf import stopping, task_progress
from miniplm_udf.errors import EXIT_BAD_CONFIG, ConfigError, MiniplmError

LOGGER = logging.getLogger("miniplm.jobs")

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the child: asks Linux for a SIGTERM when this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the trainer, which first saves its last step. A signal to the process group has reached it already."""
    for seconds, end in ((1.0, process.terminate), (10.0, process.kill)):
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            end()


def run_trainer(command: str, config_path: str, overrides: Sequence[str], *options: str) -> None:
    """Runs `python -m trainer COMMAND` to its end.

    Args:
        command: train or evaluate.
        config_path: the experiment file.
        overrides: dotted overrides of the config.
        options: further options of the command.

    Raises:
        ConfigError: the trainer refused the config (it has said why on stderr).
        MiniplmError: the trainer failed, or a signal to the trainer alone stopped it.
    """
    line = [sys.executable, "-m", "trainer", command, "--started-by-miniplm", "-c", config_path, *options, *overrides]
    name = " ".join([command, *options])
    LOGGER.info("starting the trainer: %s", name)
    # An orphan would write the checkpoints that the next run's trainer writes.
    with task_progress.hidden(), subprocess.Popen(line, stdout=subprocess.PIPE, preexec_fn=_end_with_parent) as process:
        try:
            output, _ = process.communicate()
            code = process.returncode
        except BaseException:
            _end(process)
            raise
    if stopped := stopping.received():
        raise stopped
    if code == EXIT_BAD_CONFIG:
        raise ConfigError(f"the trainer refused `{name}`: see its message above")
    if code != 0:
        raise MiniplmError(
            f"the trainer ended `{name}` with code {code}: its last message above says why; when that is mended, the "
            "same command resumes from the last checkpoint"
        )
    models = json.loads(output or "{}")
    for name, model in models.items():
        if "stopped_after" in model:
            raise MiniplmError(
                f"{name}: a signal stopped its training after step {model['stopped_after']}, which is saved; the same "
                "command resumes from there"
            )
