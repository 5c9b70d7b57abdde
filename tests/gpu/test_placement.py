"""GPUs that others hold, and models over two GPUs, on real devices.

Skips itself where there is no device; the tests of two GPUs skip themselves where there is one, and need accelerate.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.errors import ModelLoadError, ScoringError
from miniplm_udf.scoring.device_maps import MARGIN_BYTES
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.workers import gpu_memory, gpu_slots
from miniplm_udf.workers.gpu_holders import gpu_processes
from miniplm_udf.workers.gpu_memory import held_by_others, load_when_free, measured, room
from miniplm_udf.workers.model_scorers import ModelScorerFactory, assigned_device, visible_gpus
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TWO_GPUS = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"
)
GIB = 1024**3
# Another program: takes memory of GPU 0, and keeps it until its standard input ends.
OTHER = """
import sys, torch
memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda:0")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node on which this process keeps no slot yet."""
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_slots, "_KEPT", {})
    monkeypatch.setattr(gpu_memory, "_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(gpu_slots, "_ASSIGNED", [])


@pytest.fixture
def other() -> Iterator["subprocess.Popen[str]"]:
    """A program that holds 4 GiB of the first GPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(4 * GIB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", context_tokens=24, window_overlap_tokens=6, **changes)


def nats(results: list[Any]) -> list[float | None]:
    return [getattr(result, "nll_sum_nats", None) for result in results]


def test_the_memory_of_a_gpu(other: "subprocess.Popen[str]") -> None:
    (before,) = measured(["cuda:0"], visible_gpus()[:1])
    held = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda:0")
    (memory,) = measured(["cuda:0"], visible_gpus()[:1])
    assert memory.own - before.own == pytest.approx(held.nbytes, abs=0.1 * GIB)
    assert before.free - memory.free == pytest.approx(held.nbytes, abs=0.5 * GIB)
    assert held_by_others([memory])
    listed = gpu_processes(visible_gpus()[:1])
    if listed:  # in a container nvidia-smi may list nothing
        assert all(process.gpu for process in listed)


def test_a_gpu_is_waited_for_until_the_other_program_ends(other: "subprocess.Popen[str]") -> None:
    names = visible_gpus()[:1]
    (memory,) = measured(["cuda:0"], names)
    n_bytes = memory.free - MARGIN_BYTES + 2 * GIB
    assert room([memory], n_bytes) == "later"
    with pytest.raises(ScoringError, match="GiB are free"):
        load_when_free(lambda: "loaded", lambda: measured(["cuda:0"], names), names, n_bytes, "m", 0.5)
    other.kill()
    other.communicate()
    assert load_when_free(lambda: "loaded", lambda: measured(["cuda:0"], names), names, n_bytes, "m", 60) == "loaded"


def test_a_model_that_is_larger_than_the_gpu_is_refused_at_once() -> None:
    names = visible_gpus()[:1]
    with pytest.raises(ModelLoadError, match=r"models\.m: expected 2000\.0 GiB .*device_map: auto"):
        load_when_free(lambda: "loaded", lambda: measured(["cuda:0"], names), names, 2000 * GIB, "m")


def test_cudas_error_of_a_full_memory_is_known_and_refused() -> None:
    """Nobody else holds the GPU: a wait would not help."""
    names = visible_gpus()[:1]
    gpus = measured(["cuda:0"], names)
    if held_by_others(gpus):
        pytest.skip("another program holds memory of the GPU")

    def load() -> torch.Tensor:
        return torch.empty(gpus[0].total, dtype=torch.uint8, device="cuda:0")

    with pytest.raises(ModelLoadError, match="CUDA out of memory"):
        load_when_free(load, lambda: measured(["cuda:0"], names), names, 0, "m")


def test_a_factory_keeps_one_gpu(tmp_path: Path) -> None:
    config = config_of(tiny_models.make_model_folder(tmp_path))
    scorer: Any = ModelScorerFactory(config, describe("m", config), ScoreConfig(compile=False))()
    (number,) = gpu_slots.kept_gpus(visible_gpus())
    assert assigned_device() == f"cuda:{number}"
    assert tiny_models.decoder_of(scorer).device == torch.device("cuda", number)
    assert all(value is not None for value in nats(score(scorer, ROWS[:2])))


@TWO_GPUS
def test_a_factory_takes_another_gpu_if_another_process_has_the_first(tmp_path: Path) -> None:
    config = config_of(tiny_models.make_model_folder(tmp_path))
    file = gpu_slots.take_slot(visible_gpus()[:1], 1, 0.0)[1]
    scorer: Any = ModelScorerFactory(config, describe("m", config), ScoreConfig(compile=False))()
    file.close()
    (number,) = gpu_slots.kept_gpus(visible_gpus())
    assert number > 0
    assert assigned_device() == f"cuda:{number}"
    assert torch.cuda.current_device() == number
    assert tiny_models.decoder_of(scorer).device == torch.device("cuda", number)
    assert all(value is not None for value in nats(score(scorer, ROWS[:2])))


@TWO_GPUS
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_model_over_two_gpus_scores_as_on_the_cpu(tmp_path: Path, family: str) -> None:
    folder = tiny_models.make_model_folder(tmp_path, family, num_hidden_layers=8)
    config = config_of(folder)
    description = describe("m", config)
    model = load_model(config, description, [f"cuda:{number}" for number in range(2)])
    assert len({parameter.device for parameter in model.parameters()}) == 2
    split = Scorer(model, load_tokenizer(folder), description, 200, model.device, False)
    whole = tiny_models.make_scorer(folder)
    assert nats(score(split, ROWS)) == pytest.approx(nats(score(whole, ROWS)), rel=1e-4)


@TWO_GPUS
def test_a_split_model_takes_a_slot_of_each_gpu(tmp_path: Path) -> None:
    config = config_of(tiny_models.make_model_folder(tmp_path), device_map="auto")
    factory = ModelScorerFactory(config, describe("m", config), ScoreConfig())
    scorer: Any = factory()
    assert all(value is not None for value in nats(score(scorer, ROWS[:2])))
    assert gpu_slots.kept_gpus(visible_gpus()) == list(range(torch.cuda.device_count()))
    del scorer
    whole: Any = dataclasses.replace(factory, config=config_of(Path(str(config.path))))()
    assert tiny_models.decoder_of(whole).device == torch.device("cuda:0")
    assert gpu_slots.kept_gpus(visible_gpus()) == [0]
