"""The search for a token budget on a CUDA device: it fits, it changes no score, and it survives full memory."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scoring.batch_size import SearchResult, find_tokens_per_batch, place_of
from miniplm_udf.scoring.models import describe
from tests.support import tiny_models
from tests.support.scoring_oracles import Row, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE, MIB, WINDOW = "cuda", 1024 * 1024, 512
# 8 layers of 512, and a vocabulary whose logits for 4,096 tokens would be 1 GiB.
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 1024,
    "vocab_size": 64_000,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model_folder(tmp_path_factory.mktemp("model"), "llama", **SIZES)


def make_scorer(folder: Path, tokens_per_batch: int | None) -> Any:
    return tiny_models.make_scorer(
        folder, tokens_per_batch, DEVICE, "bfloat16", compiled=False, context_tokens=WINDOW, window_overlap_tokens=64
    )


def made_rows(n_rows: int) -> list[Row]:
    generator = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog,", "hello", "world", "2024"]
    return [(" ".join(generator.choice(words, size=int(n))), [], True) for n in generator.integers(8, 600, n_rows)]


def full_pass(scorer: Any, n_windows: int) -> None:
    input_BT = np.ones((n_windows, WINDOW), dtype=np.int64)
    scorer._nll(input_BT, input_BT, np.ones(input_BT.shape, dtype=bool))


def peak_of(scorer: Any, tokens: int) -> int:
    """The most bytes that are allocated during a pass over full windows."""
    torch.cuda.reset_peak_memory_stats()
    full_pass(scorer, tokens // WINDOW)
    return torch.cuda.max_memory_allocated()


def search_until_full(scorer: Any, workers: int = 1) -> SearchResult:
    """A search that only memory ends: its passes take about the same time whatever their size."""

    def run_pass(n_windows: int) -> None:
        time.sleep(0.2)
        full_pass(scorer, n_windows)

    return find_tokens_per_batch("m", run_pass, WINDOW, torch.device(DEVICE), workers, seconds=60.0)


def test_a_budget_that_is_found_fits_and_changes_no_score(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "miniplm.scorer")
    scorer = make_scorer(folder, None)
    print(caplog.text)
    budget = scorer.tokens_per_batch
    line = next(text for text in caplog.messages if text.startswith(f"m: batches of {budget:,} tokens, found in"))
    rates = {
        int(tokens.replace(",", "")): int(rate.replace(",", ""))
        for tokens, rate in re.findall(r"([\d,]+): (\d[\d,]*)", line.partition("by size: ")[2])
    }
    assert list(rates) == [4096 * 2**n for n in range(len(rates))]
    # The largest whose rate is at least 0.98 of the best; the log rounds rates to whole numbers.
    share = {tokens: rate / max(rates.values()) for tokens, rate in rates.items()}
    assert share[budget] > 0.979
    assert all(one < 0.981 for tokens, one in share.items() if tokens > budget)
    # The passes of the search are gone from memory and from the peak that the log will show.
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    assert scorer.usage().memory_bytes <= torch.cuda.memory_allocated() + 16 * MIB
    rows = made_rows(200)
    found, expected = score(scorer, rows), score(make_scorer(folder, 2048), rows)
    for one, other in zip(found, expected, strict=True):
        assert one.n_tokens == other.n_tokens
        assert abs(one.nll_sum_nats - other.nll_sum_nats) <= 0.1 * other.n_tokens
    usage = scorer.usage()
    assert usage.place == place_of(torch.device(DEVICE), "bfloat16")
    assert usage.found_tokens_per_batch in (budget, None), "None if free memory ended the search"
    assert usage.memory_total_bytes == total
    assert usage.memory_bytes <= 0.9 * total
    assert usage.model_flops > 0


@pytest.mark.parametrize("workers", [8, 32])
def test_a_full_batch_of_the_budget_leaves_a_tenth_of_the_share_free(folder: Path, workers: int) -> None:
    scorer = make_scorer(folder, 2048)
    limit = 0.9 * torch.cuda.get_device_properties(DEVICE).total_memory / workers
    result = search_until_full(scorer, workers)
    assert result.is_general, "this limit does not depend on free memory"
    assert result.tokens > 4096
    assert peak_of(scorer, result.tokens) <= limit
    # The search estimates the peak of twice the tokens, and may overestimate it.
    assert peak_of(scorer, 4 * result.tokens) > limit


def test_a_search_ends_where_memory_is_full(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The allocator refuses what mem_get_info calls free, as if another process had taken it during the search."""
    scorer = make_scorer(folder, 2048)
    full_pass(scorer, 1)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1024 * MIB) / total)
    caplog.set_level("INFO", "miniplm.scorer")
    try:
        result = search_until_full(scorer)
        print(caplog.text)
        assert caplog.text.rstrip().endswith(": no"), "the last pass did not fit"
        assert not result.is_general
        assert torch.cuda.memory_allocated() <= before + 16 * MIB, "the failed pass is gone from memory"
        full_pass(scorer, result.tokens // WINDOW)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_job_on_a_gpu_of_this_kind_takes_the_kept_budget(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psutil")
    from miniplm_udf.workers.model_scorers import ModelScorerFactory

    config = ModelConfig(path=str(folder), context_tokens=512, window_overlap_tokens=64, dtype="bfloat16")
    description = describe("m", config)
    place = place_of(torch.device("cuda:0"), "bfloat16")
    caplog.set_level("INFO", "miniplm.scorer")
    for kept, n_searches in (({place: 6144}, 0), ({"another GPU/bfloat16": 6144}, 1)):
        settings = ScoreConfig(workers_per_gpu=1, compile=False)
        scorer: Any = ModelScorerFactory(config, description, settings, kept=kept)()
        assert (scorer.tokens_per_batch == 6144) == (n_searches == 0)
        assert caplog.text.count("found in") == n_searches
