"""Makes the scorer of a model where it will run: on the GPU that Spark assigned to the task, else on what torch sees.

Input: a model's config and description, and how to run it. Output: a `Scorer`. Executor side; torch and pyspark are
loaded inside the functions. A retried task makes its scorer again, or finds the one that the scorer process kept.
"""

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from miniplm_udf.config import ModelConfig, ScoreConfig
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.workers.places import gpu_address, keep_place

if TYPE_CHECKING:
    from miniplm_udf.scoring.scorer import Scorer

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

    address = gpu_address()
    if not torch.cuda.is_available():
        if address is not None:
            LOGGER.warning("Spark assigned GPU %s, but torch sees none: scoring on the CPU", address)
        return "cpu"
    number = int(address) if address is not None and address.isdigit() else 0
    # Where the resource manager hides the other GPUs, the one that is left is number 0 whatever its address.
    return f"cuda:{number if number < torch.cuda.device_count() else 0}"


def take_gpu(device: str, workers: int | None) -> None:
    """Waits until this process is one of the at most `workers` that hold a model on the GPU; None is no bound.

    Where tasks ask Spark for no GPU, there are as many scorer processes as concurrent tasks: without this, each would
    load its model. A place is kept until the process ends. Does nothing on a CPU, and for a GPU that this process has.

    Raises:
        ScoringError: the others have kept it for ten minutes.
    """
    import torch

    if workers is not None and device.startswith("cuda"):
        keep_place(str(torch.cuda.get_device_properties(device).uuid), workers)
