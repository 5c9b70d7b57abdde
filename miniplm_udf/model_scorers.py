"""Makes the scorer of a model where it will run: on the GPU that Spark assigned to the task, else on what torch sees.

Input: a model's config and description, and how to run it. Output: a `Scorer`. Executor side; torch and pyspark are
loaded inside the functions. A retried task makes its scorer again, or finds the one that its worker process kept.
"""

import contextlib
import dataclasses
import fcntl
import logging
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from miniplm_udf.config import ModelConfig, ScoreConfig
from miniplm_udf.scoring.description import ModelDescription

if TYPE_CHECKING:
    from miniplm_udf.scoring.scorer import Scorer

# The GPUs that this process may use, with the lock that says so.
_GPUS: dict[str, IO[str]] = {}
_LOG_EVERY_SECONDS = 60.0

LOGGER = logging.getLogger("miniplm.udf")


@dataclasses.dataclass(frozen=True)
class ModelScorerFactory:
    """Makes the `Scorer` of a model on the executor. Picklable; `key` names what it makes."""

    config: ModelConfig
    description: ModelDescription
    settings: ScoreConfig

    @property
    def key(self) -> str:
        settings = self.settings
        return f"{self.description.model_revision}/{settings.tokens_per_batch}/{settings.compile}/{settings.attention}"

    def __call__(self) -> "Scorer":
        from miniplm_udf.scoring.models import load_model, resolve
        from miniplm_udf.scoring.scorer import Scorer
        from miniplm_udf.scoring.tokenizer import load_tokenizer

        start = time.monotonic()
        device = assigned_device()
        take_gpu(device, self.settings.workers_per_gpu)
        attention = None if self.settings.attention == "auto" else self.settings.attention
        model = load_model(self.config, self.description, device, attention)
        tokenizer = load_tokenizer(resolve(self.config))
        budget, compiled = self.settings.tokens_per_batch, self.settings.compile
        scorer = Scorer(model, tokenizer, self.description, budget, device, compiled)
        LOGGER.info(
            "%s: loaded on %s as %s in %.1f s",
            self.description.model_id,
            device,
            self.description.dtype,
            time.monotonic() - start,
        )
        return scorer


def assigned_device() -> str:
    """The GPU that Spark assigned to this task, else the first that torch sees, else the CPU."""
    import torch

    address = _gpu_address()
    if not torch.cuda.is_available():
        if address is not None:
            LOGGER.warning("Spark assigned GPU %s, but torch sees none: scoring on the CPU", address)
        return "cpu"
    number = int(address) if address is not None and address.isdigit() else 0
    # Where the resource manager hides the other GPUs, the one that is left is number 0 whatever its address.
    return f"cuda:{number if number < torch.cuda.device_count() else 0}"


def take_gpu(device: str, workers: int) -> None:
    """Waits until this process is one of the at most `workers` that hold a model on the GPU; for the process's life.

    Spark starts a worker process a task slot: without this, a job that asks for no GPU a task would load a model for
    each. Does nothing on a CPU, and for a GPU that this process has.
    """
    import torch

    if not device.startswith("cuda") or device in _GPUS:
        return
    name = f"miniplm-gpu-{torch.cuda.get_device_properties(device).uuid}"
    places = [open(Path(tempfile.gettempdir()) / f"{name}-{place}.lock", "a") for place in range(workers)]  # noqa: SIM115 - held until the process ends
    start = logged = time.monotonic()
    while True:
        for place in places:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _GPUS[device] = place
                return
        if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
            logged = time.monotonic()
            LOGGER.warning(
                "%s: %d other worker processes have it; waited %.0f s. Ask for a GPU a task "
                "(spark.task.resource.gpu.amount=1), or let more share it (score.workers_per_gpu)",
                device, workers, logged - start,
            )  # fmt: skip
        time.sleep(1)


def _gpu_address() -> str | None:
    try:
        from pyspark import TaskContext
    except ImportError:
        return None
    context = TaskContext.get()
    resources = context.resources() if context is not None else {}
    return str(resources["gpu"].addresses[0]) if "gpu" in resources else None
