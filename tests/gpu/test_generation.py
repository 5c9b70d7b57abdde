"""Generation on a CUDA device, against the CPU: the same random numbers, and in float32 the same texts in any batch.

Needs torch, transformers and pytest. Skips itself where there is no device.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.scoring.generator import Generator, uniform
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.tokenizer import load_tokenizer
from tests.support.gpu_device import DEVICE, needs_device
from tests.support.tiny_models import make_model_folder

pytestmark = [pytest.mark.gpu, needs_device]
TEXTS = [f"the quick brown fox number {n} jumps over the lazy dog and the tests of it" for n in range(5)]


def run(folder: Path, device: str, rows_per_batch: int, dtype: Any = "float32") -> list[Any]:
    config = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=8)
    description = describe("teacher", config, dtype)
    settings = GenerateConfig(prompt_tokens=12, new_tokens=20, tokens_per_batch=rows_per_batch * 32)
    model = load_model(config, description, device)
    generator = Generator(model, load_tokenizer(folder), description, settings, device)
    return generator.generate(generator.tokenize(TEXTS, [()] * 5), [True] * 5, [f"id{n}" for n in range(5)])


def test_the_random_numbers_are_those_of_the_cpu() -> None:
    seeds, counters = torch.tensor([[0], [-1], [1 << 62]]), torch.arange(1, 10_001)[None, :]
    assert torch.equal(uniform(seeds.to(DEVICE), counters.to(DEVICE)).cpu(), uniform(seeds, counters))


def test_a_text_is_the_same_in_any_batch_and_on_the_cpu(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, factor=3.0)
    alone = run(folder, DEVICE, 1)
    assert run(folder, DEVICE, 3) == run(folder, DEVICE, 5) == alone == run(folder, "cpu", 5)


def test_bfloat16_generates(tmp_path: Path) -> None:
    results = run(make_model_folder(tmp_path, factor=3.0), DEVICE, 5, "bfloat16")
    assert all(result.n_tokens > 0 and result.n_prompt_tokens == 12 for result in results)
