"""Makes the scorer of a model where it will run: on the GPU that Spark assigned to the task, else on what torch sees.

Input: a model's config and description, and how to run it. Output: a `Scorer`. Executor side; torch and pyspark are
loaded inside the functions. A retried task makes its scorer again, or finds the one that its worker process kept.
"""

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from miniplm_udf.config import ModelConfig
from miniplm_udf.scoring.description import ModelDescription

if TYPE_CHECKING:
    from miniplm_udf.scoring.scorer import Scorer

LOGGER = logging.getLogger("miniplm.udf")


@dataclasses.dataclass(frozen=True)
class ModelScorerFactory:
    """Makes the `Scorer` of a model on the executor. Picklable; `key` names what it makes."""

    config: ModelConfig
    description: ModelDescription
    tokens_per_batch: int

    @property
    def key(self) -> str:
        return f"{self.description.model_revision}/{self.tokens_per_batch}"

    def __call__(self) -> "Scorer":
        from miniplm_udf.scoring.models import load_model, resolve
        from miniplm_udf.scoring.scorer import Scorer
        from miniplm_udf.scoring.tokenizer import load_tokenizer

        start = time.monotonic()
        device = assigned_device()
        model = load_model(self.config, self.description, device)
        scorer = Scorer(model, load_tokenizer(resolve(self.config)), self.description, self.tokens_per_batch, device)
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


def _gpu_address() -> str | None:
    try:
        from pyspark import TaskContext
    except ImportError:
        return None
    context = TaskContext.get()
    resources = context.resources() if context is not None else {}
    return str(resources["gpu"].addresses[0]) if "gpu" in resources else None
