"""Makers of real scorers for a scorer process: they log where a model was loaded, limit memory, or lose the device.

`WatchedFactory` is a `ModelScorerFactory` whose model, tokenizer and scores are the real ones. Its log is a file, since
the scorer runs in a process of its own. Imports what a scorer process imports, so that tests/gpu runs without Spark.
"""

import contextlib
import dataclasses
import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support.tiny_models import decoder_of

# An id that no embedding has.
_OUT_OF_RANGE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedFactory(ModelScorerFactory):
    """Makes a real scorer, and logs the load and the warnings of the scorer.

    Attributes:
        log: the file.
        free_bytes: memory that scoring may take besides what is taken after the load; None for no limit.
        fatal_id: a token id that the model reads as an id outside its embedding: on CUDA the kernel asserts, after
            which the process can use the GPU no more; on a CPU torch raises IndexError.
    """

    log: Path
    free_bytes: int | None = None
    fatal_id: int | None = None

    @property
    def key(self) -> str:
        return f"{super().key}/{self.log}/{self.free_bytes}/{self.fatal_id}"

    def __call__(self) -> Any:
        scorer: Any = super().__call__()
        embeddings = decoder_of(scorer).get_input_embeddings()
        device, dtype = embeddings.weight.device, embeddings.weight.dtype
        alias = self.description.model_id
        write(self.log, event="made", alias=alias, pid=os.getpid(), device=device.type, dtype=str(dtype))
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: write(self.log, event="warned", message=record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("miniplm.scorer").addHandler(handler)
        if self.fatal_id is not None:
            embeddings.register_forward_pre_hook(
                lambda _, inputs: torch.where(inputs[0] == self.fatal_id, _OUT_OF_RANGE, inputs[0])
            )
        if self.free_bytes is not None:
            scorer.score_windows = _limited(scorer.score_windows, device, self.free_bytes)
        return scorer


def _limited(score_windows: Callable[..., None], device: torch.device, free_bytes: int) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        with memory_limit(device, free_bytes):
            score_windows(*arguments)

    return run


@contextlib.contextmanager
def memory_limit(device: torch.device, free_bytes: int) -> Iterator[None]:
    """Lets this process take only so many bytes more than it has now: of the GPU, or of address space."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + free_bytes) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + free_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(log: Path, **facts: Any) -> None:
    with log.open("a") as handle:
        handle.write(json.dumps(facts) + "\n")


def made(log: Path) -> list[dict[str, Any]]:
    """The loads of models, in order: alias, pid, device, dtype."""
    return [line for line in _lines(log) if line["event"] == "made"]


def warnings(log: Path) -> list[str]:
    """The warnings of the scorers."""
    return [line["message"] for line in _lines(log) if line["event"] == "warned"]


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
