"""Makes a model's scorer or generator where it will run: on the GPUs that this process takes, else on the CPU.

Input: a model's config and description, and settings. Output: a `Scorer` or a `Generator`. Executor side; torch and
pyspark are loaded inside the functions. A retried task makes its scorer again, or finds the scorer that the process
kept.
"""

import contextlib
import dataclasses
import gc
import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.workers.gpu_memory import by_room, load_when_free, measured
from miniplm_udf.workers.gpu_slots import (
    PATIENCE_SECONDS,
    device_numbers,
    give_back,
    gpu_addresses,
    keep_gpus,
    kept_gpus,
)

if TYPE_CHECKING:
    from miniplm_udf.scoring.generator import Generator
    from miniplm_udf.scoring.text_scorer import TextScorer

LOGGER = logging.getLogger("miniplm.workers")

# The modules of this process's models on GPUs.
_ON_GPUS: "weakref.WeakSet[Any]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class ModelScorerFactory:
    """Makes the scorer of a model on the executor. Picklable; equal keys make equal scorers.

    Attributes:
        config: where the model is.
        description: the model as `scoring.models.describe` found it.
        settings: token budget, compilation and attention.
        takes_all_gpus: whether the process takes all of its GPUs: another model of the run is split over them.
        kept: token budgets that earlier jobs found, by place (`batch_size.place_of`). At another place the scorer
            searches its own. A CPU does not use them.
    """

    config: ModelConfig
    description: ModelDescription
    settings: ScoreConfig
    takes_all_gpus: bool = False
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names what the factory makes; a process uses one scorer for all factories with the same key."""
        settings = self.settings
        place = _gpus_key(self.config, self.takes_all_gpus)
        place += "" if self.config.server is None else f"/{self.config.server}"
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

        takes_all_gpus = self.takes_all_gpus or self.config.device_map is not None
        device, model = _loaded(self.config, self.description, self.settings, takes_all_gpus)
        workers = self.settings.workers_per_gpu or 1
        scorer = Scorer(
            model, tokenizer, self.description, self._tokens_per_batch(device, workers), device, self.settings.compile,
            workers, self.settings.attention,
        )  # fmt: skip
        scorer.warnings = prefix_warnings(model, tokenizer, self.description, folder, device)
        for warning in scorer.warnings:
            LOGGER.warning("%s", warning)
        return scorer

    def _tokens_per_batch(self, device: str, workers: int) -> int | None:
        """The configured token budget, or on a GPU the one that was kept for it; None lets the scorer find its own."""
        import torch

        from miniplm_udf.scoring.batch_size import place_of

        is_searched = device != "cpu" and self.config.device_map is None
        if self.settings.tokens_per_batch is not None or not is_searched:
            return self.settings.tokens_per_batch
        place = place_of(torch.device(device), self.description.dtype, workers, self.settings.attention)
        return self.kept.get(place)


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
        place = _gpus_key(self.config, False)
        return f"generate/{settings}/{self.settings.tokens_per_batch}/{self.workers.attention}{place}"

    def __call__(self) -> "Generator":
        from miniplm_udf.scoring.generator import Generator
        from miniplm_udf.scoring.model_files import model_folder
        from miniplm_udf.scoring.tokenizer import load_tokenizer

        device, model = _loaded(self.config, self.description, self.workers, self.config.device_map is not None)
        return Generator(model, load_tokenizer(model_folder(self.config)), self.description, self.settings, device)


def _gpus_key(config: ModelConfig, takes_all_gpus: bool) -> str:
    """The part of a factory's key that keeps models on one GPU apart from models of a process with all GPUs."""
    return "" if config.device_map is None and not takes_all_gpus else f"/all GPUs/{config.device_map}"


def _loaded(
    config: ModelConfig, description: ModelDescription, settings: ScoreConfig, takes_all_gpus: bool
) -> tuple[str, Any]:
    """The device of the model's input, and the model, loaded onto the GPUs of this process."""
    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.models import load_model
    from miniplm_udf.scoring.weights import weight_bytes

    start = time.monotonic()
    attention = None if settings.attention == "auto" else settings.attention
    gpus = visible_gpus()
    n_bytes = weight_bytes(model_folder(config), 4 if description.dtype == "float32" else 2) if gpus else 0
    devices, kept = _take_gpus(gpus, settings, takes_all_gpus, n_bytes)
    devices, names = (devices[:1], kept[:1]) if config.device_map is None else (devices, kept)

    def load() -> Any:
        return load_model(config, description, devices[0] if config.device_map is None else devices, attention)

    if names:
        patience = max(0.0, start + PATIENCE_SECONDS - time.monotonic())
        with _given_back_on_error(kept):
            model = load_when_free(
                load, lambda: measured(devices, names), names, n_bytes, description.model_id, patience
            )
        # A scorer may keep modules of the model without the model.
        _ON_GPUS.update(model.modules())
    else:
        model = load()
    seconds, places = time.monotonic() - start, " + ".join(devices)
    LOGGER.info("%s: loaded on %s as %s in %.1f s", description.model_id, places, description.dtype, seconds)
    return str(model.device), model


@contextlib.contextmanager
def _given_back_on_error(names: Sequence[str]) -> Iterator[None]:
    """Gives the GPUs back if the block fails and this process holds no model, so that a retry may take other GPUs."""
    try:
        yield
    except Exception:
        gc.collect()
        if not _ON_GPUS:
            give_back(names)
        raise


def _take_gpus(
    names: list[str], settings: ScoreConfig, takes_all_gpus: bool, n_bytes: int
) -> tuple[list[str], list[str]]:
    """The torch devices that this process keeps, and their UUIDs; without a GPU the CPU and no UUID.

    Raises:
        ConfigError: several processes would each take all GPUs of this machine.
        ScoringError: other processes keep the slots.
    """
    addresses = gpu_addresses()
    if not names:
        if addresses:
            LOGGER.warning("Spark assigned GPU %s, but torch finds none: scoring on the CPU", ", ".join(addresses))
        return ["cpu"], []
    if takes_all_gpus and settings.workers > 1 and not addresses:
        raise ConfigError(
            f"score.workers: expected 1, because a process with a model with device_map: auto takes all GPUs that it "
            f"sees, and Spark assigned none to this task; found {settings.workers}; set score.workers to 1, or let "
            f"Spark assign the GPUs (spark.executor.resource.gpu.amount, docs/cluster.md)"
        )
    is_first_model = not kept_gpus(names)
    numbers = keep_gpus(
        names, addresses, settings.workers_per_gpu, takes_all_gpus, rank=lambda own: by_room(own, n_bytes)
    )
    # `nll_udf` has any number of workers for each GPU, and `workers` says nothing about them.
    is_counted = settings.workers_per_gpu is not None and not addresses
    if is_first_model and is_counted and len(numbers) == 1 and settings.workers < len(names):
        LOGGER.warning(
            "score.workers is %d, and this machine has %d GPUs: the other GPUs are not used; raise score.workers",
            settings.workers, len(names),
        )  # fmt: skip
    return [f"cuda:{number}" for number in numbers], [names[number] for number in numbers]


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that torch sees, in the order of their device numbers; empty where there is none."""
    import torch

    if not torch.cuda.is_available():
        return []
    uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    return [uuid.removeprefix("GPU-") for uuid in uuids]


def assigned_device() -> str:
    """The torch device of this process: the GPU that it keeps, else the GPU that Spark assigned, else the first one.

    Without a GPU it is the CPU.
    """
    names = visible_gpus()
    numbers = kept_gpus(names) or device_numbers(names, gpu_addresses())
    return f"cuda:{numbers[0]}" if numbers else "cpu"
