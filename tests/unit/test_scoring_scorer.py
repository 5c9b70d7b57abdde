"""The scorer's life: rows and slices, failures that stand at their rows, passes that do not fit, progress.

What the numbers are is held in test_scoring_exactness.py, what must not change them in test_scoring_invariance.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.scoring.tokenizer import load_tokenizer
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, Row, score
from tests.support.tiny_models import decoder_of, make_scorer


def check_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Score), one
        assert one.nll_sum_nats == pytest.approx(other.nll_sum_nats, abs=1e-5 * one.n_tokens)
        assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("n_rows", [0, 1, 4, 5])
def test_slices_hold_every_row(llama: Path, n_rows: int) -> None:
    scorer = make_scorer(llama)
    scorer.slice_bytes = 4 * len("hello world")
    rows: list[Row] = [(f"hello worl{i}", [], True) for i in range(n_rows)]
    found = score(scorer, rows)
    assert len(found) == n_rows
    for one, row in zip(found, rows, strict=True):
        check_equal([one], score(scorer, [row]))


def test_tokenizing_and_scoring_apart_are_scoring(llama: Path) -> None:
    """One scorer tokenizes, another with the same tokenizer scores: with its own prefix and separators."""
    texts, ends, ends_document = zip(*ROWS, strict=True)
    shared = make_scorer(llama).tokenize(texts, ends)
    for other in (make_scorer(llama), make_scorer(llama, context_prefix="token", context_tokens=30)):
        check_equal(other.score_tokenized(shared, ends_document), score(other, ROWS))


def test_special_tokens_in_text_are_ordinary_text(llama: Path) -> None:
    [found] = score(make_scorer(llama), [("a<|endoftext|>", [], False)])
    assert found.n_tokens > 5


def test_failures_stand_at_their_rows(llama: Path) -> None:
    rows: list[Row] = [("hello", [], True), ("", [], True), ("bad \ud800", [], True), ("world", [], True)]
    found = score(make_scorer(llama), rows)
    assert isinstance(found[0], Score)
    assert isinstance(found[3], Score)
    assert [one.reason for one in found if isinstance(one, Failure)] == ["no_tokens", "tokenizer_failed"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_is_a_failure_of_that_text_alone(llama: Path, poison: float) -> None:
    scorer = make_scorer(llama)
    bad = load_tokenizer(llama).encode("~", add_special_tokens=False).ids[0]
    with torch.inference_mode():
        decoder_of(scorer).get_input_embeddings().weight[bad] = poison
    # In one batch; the output layer is not tied in this model: only rows that hold the token are hurt.
    found = score(scorer, [("hello", [], True), ("he~llo", [], True), ("world", [], True)])
    assert [type(one) for one in found] == [Score, Failure, Score]
    assert found[1].reason == "nan_score"


# --- passes that do not fit ---


def fail_above(scorer: Any, n_elements: int, error: Exception, n_columns: int = 10**9) -> Any:
    """Makes passes over so many elements fail, until the handle is removed."""

    def check(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        input_BT = named["input_ids"] if "input_ids" in named else arguments[0]
        if input_BT.numel() > n_elements or input_BT.shape[1] > n_columns:
            raise error

    return decoder_of(scorer).register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried")],
)
def test_a_batch_that_does_not_fit_is_split(llama: Path, error: Exception) -> None:
    scorer = make_scorer(llama, 100_000)
    expected = score(scorer, ROWS[:5])
    with fail_above(scorer, 150, error):
        check_equal(score(scorer, ROWS[:5]), expected)


@pytest.mark.slow
def test_a_text_that_does_not_fit_alone_fails_alone(llama: Path) -> None:
    scorer = make_scorer(llama, 100_000)
    rows: list[Row] = [("hello", [], True), ("x" * 70, [], True), ("world", [], True)]
    expected = score(scorer, rows)
    with fail_above(scorer, 10**9, torch.OutOfMemoryError("CUDA out of memory"), n_columns=20):
        found = score(scorer, rows)
    assert [type(one) for one in found] == [Score, Failure, Score]
    assert found[1].reason == "out_of_memory"
    assert "24 tokens" in found[1].detail
    check_equal([found[0], found[2]], [expected[0], expected[2]])
    # The next call starts afresh.
    check_equal(score(scorer, rows), expected)


def test_a_batch_that_fails_makes_later_batches_half_as_large(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parts that fail do not make them smaller again, and a batch never has less than the longest window."""
    scorer = make_scorer(llama, 48)
    texts: list[Row] = [("x" * 16, [], True)] * 3
    n_tokens = score(scorer, texts)[0].n_tokens
    assert n_tokens == 16
    budgets = []
    with fail_above(scorer, n_tokens, torch.OutOfMemoryError("CUDA out of memory")):
        for _ in range(3):
            score(scorer, texts)
            budgets.append(scorer._fitting_tokens)
    assert budgets == [32, 24, 24]
    assert scorer.description.longest_input_tokens == 24
    # A batch of 3 windows, whose half of 2 fails too, and one of 2; then windows are alone.
    assert caplog.text.count("does not fit in memory") == 2
    # The setting may be smaller; then it is the least size.
    small = make_scorer(llama, 20)
    small._use_smaller_batches(2, 10)
    assert small._fitting_tokens == 20


def test_other_errors_are_raised(llama: Path) -> None:
    scorer = make_scorer(llama)
    with (
        fail_above(scorer, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        pytest.raises(RuntimeError, match="mat1 and mat2"),
    ):
        score(scorer, ROWS[:1])


def test_progress_counts_the_scored_tokens(llama: Path) -> None:
    scorer = make_scorer(llama)
    counted: list[int] = []
    scorer.on_progress = counted.append
    found = score(scorer, ROWS)
    assert sum(counted) == sum(one.n_tokens for one in found if isinstance(one, Score))
