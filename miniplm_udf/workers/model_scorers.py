"""Makes a model's scorer or generator where it will run: on the GPU that Spark assigned, else where torch can.

Input: a model's config and description, and settings. Output: a `Scorer` or a `Generator`. Executor side; torch and
pyspark are loaded inside the functions. A retried task makes its scorer again, or finds the scorer that the process
kept.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.workers.process_slots import gpu_address, keep_slot

if TYPE_CHECKING:
    from miniplm_udf.scoring.generator import Generator
    from miniplm_udf.scoring.text_scorer import TextScorer

LOGGER = logging.getLogger("miniplm.workers")


@dataclasses.dataclass(frozen=True)
class ModelScorerFactory:
    """Makes the scorer of a model on the executor. Picklable; equal keys make equal scorers.

    Attributes:
        config: where the model is.
        description: the model as `scoring.models.describe` found it.
        settings: token budget, compilation and attention.
        kept: token budgets of earlier jobs, by kind of device and dtype (`batch_size.place_of`). On a GPU of another
            kind the scorer searches its own. A CPU does not use them.
    """

    config: ModelConfig
    description: ModelDescription
    settings: ScoreConfig
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names what the factory makes; a process uses one scorer for all factories with the same key."""
        settings = self.settings
        place = "" if self.config.server is None else f"/{self.config.server}"
        return (
            f"{self.description.model_revision}/{settings.tokens_per_batch}/{settings.compile}/{settings.attention}"
            f"{place}"
        )

    def __call__(self) -> "TextScorer":
        from miniplm_udf.scoring.model_files import model_folder
        from miniplm_udf.scoring.tokenizer import load_tokenizer

        folder = model_folder(self.config)
        tokenizer = load_tokenizer(folder)
        if self.config.server is not None:
            from miniplm_udf.scoring.server_scorer import ServerScorer

            return ServerScorer(self.config.server, tokenizer, self.description)
        from miniplm_udf.scoring.prefix_probe import prefix_warnings
        from miniplm_udf.scoring.scorer import Scorer

        device, model = _loaded(self.config, self.description, self.settings)
        workers = self.settings.workers_per_gpu or 1
        scorer = Scorer(
            model, tokenizer, self.description, self._tokens_per_batch(device, workers), device, self.settings.compile,
            workers,
        )  # fmt: skip
        scorer.warnings = prefix_warnings(model, tokenizer, self.description, folder, device)
        for warning in scorer.warnings:
            LOGGER.warning("%s", warning)
        return scorer

    def _tokens_per_batch(self, device: str, workers: int) -> int | None:
        """The configured token budget, or on a GPU the one that was kept for it; None lets the scorer find its own."""
        import torch

        from miniplm_udf.scoring.batch_size import place_of

        if self.settings.tokens_per_batch is not None or device == "cpu":
            return self.settings.tokens_per_batch
        return self.kept.get(place_of(torch.device(device), self.description.dtype, workers))


@dataclasses.dataclass(frozen=True)
class ModelGeneratorFactory:
    """Makes the `Generator` of a model on the executor. Picklable; equal keys make equal generators.

    Attributes:
        config: where the model is.
        description: the model as `scoring.models.describe` found it.
        settings: lengths, sampling, seed and token budget.
        workers: attention, and how many processes share a GPU.
    """

    config: ModelConfig
    description: ModelDescription
    settings: GenerateConfig
    workers: ScoreConfig

    @property
    def key(self) -> str:
        """Names what the factory makes; a process uses one generator for all factories with the same key."""
        settings = self.settings.revision(self.description.model_revision)
        return f"generate/{settings}/{self.settings.tokens_per_batch}/{self.workers.attention}"

    def __call__(self) -> "Generator":
        from miniplm_udf.scoring.generator import Generator
        from miniplm_udf.scoring.model_files import model_folder
        from miniplm_udf.scoring.tokenizer import load_tokenizer

        device, model = _loaded(self.config, self.description, self.workers)
        return Generator(model, load_tokenizer(model_folder(self.config)), self.description, self.settings, device)


def _loaded(config: ModelConfig, description: ModelDescription, settings: ScoreConfig) -> tuple[str, Any]:
    """The device of this task and the model, loaded there."""
    from miniplm_udf.scoring.models import load_model

    start = time.monotonic()
    device = assigned_device()
    take_gpu(device, settings.workers_per_gpu)
    model = load_model(config, description, device, None if settings.attention == "auto" else settings.attention)
    seconds = time.monotonic() - start
    LOGGER.info("%s: loaded on %s as %s in %.1f s", description.model_id, device, description.dtype, seconds)
    return device, model


def assigned_device() -> str:
    """The torch device of this task: the GPU that Spark assigned to it, else torch's first GPU, else the CPU."""
    import torch

    address = gpu_address()
    if not torch.cuda.is_available():
        if address is not None:
            LOGGER.warning("Spark assigned GPU %s, but torch finds none: scoring on the CPU", address)
        return "cpu"
    number = int(address) if address is not None and address.isdigit() else 0
    # Where the resource manager hides the other GPUs, the assigned GPU is number 0 whatever its address.
    return f"cuda:{number if number < torch.cuda.device_count() else 0}"


def take_gpu(device: str, workers: int | None) -> None:
    """Waits until this process is one of at most `workers` that hold a model on the GPU.

    Where tasks ask Spark for no GPU, there are as many scorer processes as concurrent tasks, and without this each
    would load its model. The process keeps its slot until it ends. Does nothing on a CPU, or if it has a slot already.

    Args:
        device: a torch device.
        workers: processes that may share the GPU; None for any number.

    Raises:
        ScoringError: other processes have kept all slots for ten minutes.
    """
    import torch

    if workers is not None and device.startswith("cuda"):
        keep_slot(str(torch.cuda.get_device_properties(device).uuid), workers)
