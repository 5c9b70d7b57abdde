"""Exactness, invariance and memory of the scorer on a CUDA device, against the CPU and the brute-force oracle.

Needs torch, transformers and pytest: `pytest tests/gpu` runs on a bare GPU box. Skips itself where there is no device.
The forward passes run without TF32 where float32 is compared, as its 10 bits would hide what is looked for.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.results import Score
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, Row, brute_force, plain_model, plain_tokenizer, score
from tests.support.tiny_models import make_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
MIB = 1024 * 1024
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog,", "hello", "world", "2024", "ünd", "😀", "终"]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # Mamba's convolution; products have it off by default
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_scorer(path: Path, tokens_per_batch: int = 64, device: str = "cpu", *args: Any, **changes: Any) -> Any:
    """Without torch.compile unless told: it takes seconds a model, and has tests of its own."""
    return tiny_models.make_scorer(path, tokens_per_batch, device, *args, **({"compiled": False} | changes))


def made_rows(n_rows: int, longest: int = 120) -> list[Row]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, longest, n_rows)
    return [(" ".join(generator.choice(WORDS, size=int(length))), [], True) for length in lengths]


def check_equal(found: list[Any], expected: list[Any], nats_per_token: float) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        if not isinstance(other, Score):
            assert one.reason == other.reason
            continue
        assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)
        assert abs(one.nll_sum_nats - other.nll_sum_nats) <= nats_per_token * one.n_tokens


@pytest.mark.parametrize("context_prefix", ["none", "token"])
@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.OTHER_FAMILIES])
def test_float32_equals_the_cpu(tmp_path: Path, family: str, context_prefix: str) -> None:
    folder = make_model_folder(tmp_path, family)
    expected = score(make_scorer(folder, context_prefix=context_prefix), ROWS)
    check_equal(score(make_scorer(folder, 200, DEVICE, context_prefix=context_prefix), ROWS), expected, 1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_float32_equals_brute_force(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path, family)
    model, tokenizer = plain_model(folder, DEVICE), plain_tokenizer(folder)
    for row, found in zip(ROWS[:4], score(make_scorer(folder, 200, DEVICE), ROWS[:4]), strict=True):
        expected = brute_force(model, tokenizer, row)
        assert (found.n_tokens, found.n_bytes) == (expected.n_tokens, expected.n_bytes)
        assert abs(found.nll_sum_nats - expected.nll_sum_nats) <= 1e-4 * found.n_tokens


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_batches_and_order_do_not_matter(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path, family)
    rows = made_rows(50)
    scorer = make_scorer(folder, 64, DEVICE)
    alone = [score(scorer, [row])[0] for row in rows]
    for tokens_per_batch in (100, 1000, 100_000):
        found = score(make_scorer(folder, tokens_per_batch, DEVICE), rows[::-1])[::-1]
        check_equal(found, alone, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_compiled_equals_eager(tmp_path: Path, family: str) -> None:
    """Shapes change from batch to batch, as they do in a job."""
    folder = make_model_folder(tmp_path, family)
    rows = made_rows(50)
    expected = score(make_scorer(folder), rows)
    check_equal(score(make_scorer(folder, 300, DEVICE, compiled=True), rows), expected, 1e-4)


def middling(tmp_path: Path, **changes: Any) -> Path:
    """A Llama of 8 layers of 512, whose rounding is like that of a model in use."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    return make_model_folder(tmp_path, "llama", factor=2.0, **(sizes | changes))


def test_bfloat16_is_near_float32_and_keeps_its_top_half(tmp_path: Path) -> None:
    rows = made_rows(400)
    means: dict[str, list[np.ndarray]] = {"float32": [], "bfloat16": []}
    for seed in range(2):
        folder = middling(tmp_path, name=f"model{seed}", seed=seed)
        for dtype, found in means.items():
            scorer = make_scorer(folder, 8192, DEVICE, dtype, context_tokens=256, window_overlap_tokens=32)
            found.append(np.array([one.nll_sum_nats / one.n_tokens for one in score(scorer, rows)]))
    spread = np.abs(np.array(means["bfloat16"]) - np.array(means["float32"]))
    half = len(rows) // 2
    tops = [set(np.argsort(second - first)[half:].tolist()) for first, second in means.values()]
    agreement = len(tops[0] & tops[1]) / half
    print(f"bf16 - fp32, nats per token: max {spread.max():.4f}, mean {spread.mean():.5f}; top half {agreement:.3f}")
    assert 0 < spread.max() < 0.05
    assert agreement > 0.95


def test_auto_is_bfloat16(tmp_path: Path) -> None:
    config = ModelConfig(path=str(make_model_folder(tmp_path)), context_tokens=64, window_overlap_tokens=8)
    assert describe("m", config).dtype == "bfloat16"


# --- memory ---


@pytest.fixture
def free_fraction() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def leave_free(n_bytes: int) -> None:
    """Lets this process take so many bytes more than it has now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)


def test_a_vocabulary_of_152k_takes_less_than_its_logits(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, "llama", vocab_size=152_064, max_position_embeddings=1024)
    scorer = make_scorer(folder, 8 * 1024, DEVICE, context_tokens=1024, window_overlap_tokens=128)
    rows = [(text[0] * 30, [], True) for text in made_rows(8)]
    score(scorer, rows[:1])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert all(isinstance(one, Score) for one in score(scorer, rows))
    assert torch.cuda.max_memory_allocated() - before < 1024 * 152_064 * 4


@pytest.mark.usefixtures("free_fraction")
def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CUDA's own error, not one of ours: 200 texts of hidden states at once are several times what is left free."""
    scorer = make_scorer(middling(tmp_path), 10**6, DEVICE, context_tokens=1024, window_overlap_tokens=128)
    rows = made_rows(400)
    expected = score(scorer, rows)
    leave_free(200 * MIB)
    with caplog.at_level(logging.WARNING, "miniplm.scorer"):
        found = score(scorer, rows)
    assert "does not fit" in caplog.text
    check_equal(found, expected, 1e-5)


@pytest.mark.usefixtures("free_fraction")
def test_a_text_that_does_not_fit_alone_fails_alone(tmp_path: Path) -> None:
    """Room for 32 MiB: a text of 4,096 tokens takes more, one of some words does not."""
    folder = middling(tmp_path, max_position_embeddings=4096, intermediate_size=16_384)
    scorer = make_scorer(folder, 10**6, DEVICE, context_tokens=4096, window_overlap_tokens=128)
    rows: list[Row] = [("hello world", [], True), ("q" * 5000, [], True), ("a b", [], True)]
    score(scorer, [rows[0], rows[2]])
    leave_free(32 * MIB)
    found = score(scorer, rows)
    assert [getattr(one, "reason", "scored") for one in found] == ["scored", "out_of_memory", "scored"]
