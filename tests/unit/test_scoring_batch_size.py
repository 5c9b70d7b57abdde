"""The search for a token budget: its rules on given measurements, and searches on a CPU, one with a real model."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.scoring.batch_size import (
    Measurement,
    SearchResult,
    find_tokens_per_batch,
    largest_not_slower,
    place_of,
    still_rises,
)
from tests.support import tiny_models
from tests.support.tiny_models import decoder_of, make_scorer

CPU = torch.device("cpu")
# Seconds of a pass that costs 10 ms and 10 us a token.
AFFINE = {tokens: 0.01 + 1e-5 * tokens for tokens in (4096, 8192, 16384, 32768, 65536)}


def measurements(seconds: dict[int, float], *too_large: int) -> list[Measurement]:
    fitting = [Measurement(tokens, one, True) for tokens, one in seconds.items()]
    return [*fitting, *(Measurement(tokens, math.inf, False) for tokens in too_large)]


@pytest.mark.parametrize(
    ("seconds", "too_large", "expected"),
    [
        ({4096: 1.0}, [], 4096),
        # Faster by 11, 6, 3.0 and 1.5 %: the two largest are equal up to 2 %.
        (AFFINE, [], 65536),
        ({tokens: AFFINE[tokens] for tokens in (4096, 8192)}, [16384], 8192),
        # Slower from some size on: by more than 2 %, or by less.
        ({1000: 0.010, 2000: 0.018, 4000: 0.038}, [], 2000),
        ({1000: 0.010, 2000: 0.018, 4000: 0.0365}, [], 4000),
        # One slow measurement does not hide a larger size.
        ({1000: 0.010, 2000: 0.025, 4000: 0.036}, [], 4000),
    ],
)
def test_the_largest_that_fits_and_is_not_slower(
    seconds: dict[int, float], too_large: list[int], expected: int
) -> None:
    assert largest_not_slower(measurements(seconds, *too_large)) == expected


def test_a_size_that_runs_but_takes_too_much_memory_is_not_taken() -> None:
    tried = [Measurement(1000, 0.01, True), Measurement(2000, 0.01, False)]
    assert largest_not_slower(tried) == 1000
    assert not still_rises(tried)


def test_if_none_fits_it_is_one_window() -> None:
    assert largest_not_slower([Measurement(1000, math.inf, False)]) == 1000


def test_the_search_goes_on_while_the_rate_rises_by_more_than_three_percent() -> None:
    tried = measurements(AFFINE)
    assert [still_rises(tried[: n + 1]) for n in range(5)] == [True, True, True, False, False]
    # Compared with the best size, not with the last one, which may have been disturbed.
    assert not still_rises(measurements({1000: 0.010, 2000: 0.025, 4000: 0.0395}))
    assert not still_rises(measurements({1000: 0.01}, 2000))


class Passes:
    """Passes of equal duration whatever their size, so that the rate rises without end; notes their windows."""

    def __init__(self, largest: int = 10**9, error: Callable[[], Exception] = torch.OutOfMemoryError) -> None:
        self.largest, self.error = largest, error
        self.windows: list[int] = []

    def __call__(self, n_windows: int) -> None:
        self.windows.append(n_windows)
        if n_windows > self.largest:
            raise self.error()
        time.sleep(0.005)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, MemoryError, lambda: RuntimeError("CUDA error: out of memory")]
)
def test_it_doubles_until_a_pass_does_not_fit(error: Callable[[], Exception]) -> None:
    passes = Passes(100, error)
    # 4,096 tokens are 5 windows of 1,000 tokens.
    result = find_tokens_per_batch("m", passes, 1000, CPU)
    assert result == SearchResult(80_000, is_general=False), "something else may have held the memory"
    assert sorted(set(passes.windows)) == [5, 10, 20, 40, 80, 160]


def test_windows_that_are_longer_than_the_first_size_are_tried_alone() -> None:
    passes = Passes(2)
    assert find_tokens_per_batch("m", passes, 10_000, CPU).tokens == 20_000
    assert sorted(set(passes.windows)) == [1, 2, 4]


def test_if_not_even_the_first_size_fits_scoring_begins_with_it() -> None:
    assert find_tokens_per_batch("m", Passes(0), 1000, CPU) == SearchResult(5000, is_general=False)


def test_no_size_is_begun_without_time_for_it() -> None:
    passes = Passes()
    assert find_tokens_per_batch("m", passes, 1000, CPU, seconds=0.0) == SearchResult(5000, is_general=True)
    assert set(passes.windows) == {5}


def test_it_ends_when_the_rate_does_not_rise(caplog: pytest.LogCaptureFixture) -> None:
    windows: list[int] = []

    def run_pass(n_windows: int) -> None:
        windows.append(n_windows)
        time.sleep(0.002 * n_windows)

    caplog.set_level("INFO", "miniplm.scorer")
    result = find_tokens_per_batch("teacher", run_pass, 1000, CPU)
    budget = result.tokens
    assert result.is_general
    assert budget in (5000, 10_000, 20_000)
    assert max(windows) <= 40
    assert f"teacher: batches of {budget:,} tokens, found in" in caplog.text
    assert "tokens/s by size: 5,000: " in caplog.text


def test_other_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        find_tokens_per_batch("m", Passes(0, lambda: RuntimeError("cannot be multiplied")), 1000, CPU)


class CountedMemory(Passes):
    """A GPU of 100 GB with 10 GB of weights, by torch's counters; each window of a pass takes 1 GB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        super().__init__()
        self.peak = 10
        counters: dict[str, Callable[..., Any]] = {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (free * 10**9, 100 * 10**9),
            "memory_allocated": lambda device: 10 * 10**9,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", 10),
            "max_memory_allocated": lambda device: self.peak * 10**9,
        }
        for name, counter in counters.items():
            monkeypatch.setattr(torch.cuda, name, counter)

    def __call__(self, n_windows: int) -> None:
        super().__call__(n_windows)
        self.peak = max(self.peak, 10 + n_windows)


@pytest.mark.parametrize(
    ("free", "workers", "expected", "is_general"),
    [
        # Half of the free memory is for others: at most 55 GB. 40 windows have a peak of 50 GB.
        (90, 1, 40, False),
        # A tenth of the process's half stays free: at most 45 GB, which does not depend on others.
        (90, 2, 20, True),
        # Another process has the most: at most 20 GB.
        (20, 1, 10, False),
        # Nothing is left, but no pass is shorter than this.
        (2, 1, 5, False),
    ],
)
def test_memory_stays_free(
    free: int, workers: int, expected: int, is_general: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = CountedMemory(monkeypatch, free)
    result = find_tokens_per_batch("m", passes, 1000, torch.device("cuda", 0), workers)
    assert result == SearchResult(1000 * expected, is_general)
    assert max(passes.windows) == expected, "no pass over more is tried"


def test_a_pass_that_fails_within_the_own_part_was_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = CountedMemory(monkeypatch, 90)
    passes.largest = 10
    result = find_tokens_per_batch("m", passes, 1000, torch.device("cuda", 0), 2)
    assert result == SearchResult(10_000, is_general=False)


def test_a_search_that_the_rate_ends_does_not_depend_on_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = CountedMemory(monkeypatch, 90)

    def run_pass(n_windows: int) -> None:
        time.sleep(0.004 * n_windows**1.5)  # each larger pass is clearly slower per window
        passes(n_windows)

    assert find_tokens_per_batch("m", run_pass, 1000, torch.device("cuda", 0)).is_general
    assert max(passes.windows) < 40


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_real_model_is_searched_with_full_windows(tmp_path: Path) -> None:
    scorer = make_scorer(tiny_models.make_model_folder(tmp_path, "llama"))
    shapes: list[tuple[int, ...]] = []

    def check(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        shape = tuple(named["input_ids"].shape)
        shapes.append(shape)
        if math.prod(shape) > 20_000:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with decoder_of(scorer).register_forward_pre_hook(check, with_kwargs=True):
        budget = scorer._search_tokens_per_batch(scorer.description, 1).tokens
    assert {length for _, length in shapes} == {24}
    # 4,096 tokens are 171 windows of 24.
    assert budget in {n * 24 for n, _ in shapes if n * 24 <= 20_000}
    assert budget in (171 * 24, 2 * 171 * 24, 4 * 171 * 24)
    # It changes no score and no budget of the scorer.
    assert (scorer.tokens_per_batch, scorer.usage().found_tokens_per_batch) == (64, None)


def test_places() -> None:
    assert place_of(CPU, "float32") == place_of(CPU, "float32", 2) == "cpu/float32"
    assert place_of(CPU, "float32", 1, "eager") == "cpu/float32/eager"


def test_places_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert place_of(gpu, "bfloat16") == "NVIDIA H200/bfloat16"
    assert place_of(gpu, "bfloat16", 2) == "NVIDIA H200/bfloat16/2 workers"
    assert place_of(gpu, "bfloat16", 2, "sdpa") == "NVIDIA H200/bfloat16/2 workers/sdpa"
