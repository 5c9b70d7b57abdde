"""The scorer against a brute-force loop, one token at a time, and against itself in other batches and orders."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.config import ModelConfig
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.scorer import Failure, Score, Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.scoring.windows import windows
from tests.unit import tiny_models

CONTEXT, OVERLAP = 24, 6
# Text, segment ends, ends_document.
ROWS: list[tuple[str, list[int], bool]] = [
    ("hello world", [], True),
    ("the quick brown fox jumps over the lazy dog. " * 2, [], False),
    ("é😀 first.second ünd", [12], True),
    ("x" * 70, [30, 50], True),
    ("text that spells <|endoftext|> and <|im_end|>", [], True),
    ("a", [], True),
    ("  a  b\n\n", [], False),
]


def make_scorer(
    folder: Path, tokens_per_batch: int = 64, **changes: Any
) -> tuple[Scorer, Callable[[str, list[int], bool], Score]]:
    """A scorer of a folder's model, and a brute-force one of the same."""
    config = ModelConfig(path=str(folder), context_tokens=CONTEXT, window_overlap_tokens=OVERLAP, **changes)
    description = describe("m", config, dtype="float32")
    model, tokenizer = load_model(config, description), load_tokenizer(folder)

    def brute_force(text: str, ends: list[int], ends_document: bool) -> Score:
        prefixed = description.context_prefix == "token"
        ids, inserted = ([0], [0]) if prefixed else ([], [])
        raw = text.encode()
        bounds = [0, *ends, len(raw)]
        for number, (left, right) in enumerate(itertools.pairwise(bounds)):
            ids += tokenizer.encode(raw[left:right].decode(), add_special_tokens=False).ids
            if number < len(ends) or ends_document:
                inserted.append(len(ids))
                ids.append(description.document_separator_id)
        total, n_tokens = 0.0, 0
        for window in windows(len(ids) - 1, CONTEXT, OVERLAP):
            for last in range(window.first_scored, window.end):
                skipped = last + 1 in inserted if prefixed else ids[last] == description.document_separator_id
                if not skipped:
                    logits_V = model(torch.tensor([ids[window.start : last + 1]])).logits[0, -1].double()
                    total -= float(torch.log_softmax(logits_V, dim=-1)[ids[last + 1]])
                    n_tokens += 1
        return Score(total, n_tokens, -1)

    return Scorer(model, tokenizer, description, tokens_per_batch), brute_force


def score(scorer: Scorer, rows: list[tuple[str, list[int], bool]]) -> list[Score | Failure]:
    return scorer.score([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny products wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("context_prefix", ["none", "token"])
@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "granite", "cohere"])
def test_equals_brute_force(tmp_path: Path, family: str, context_prefix: str) -> None:
    folder = tiny_models.make_model_folder(tmp_path, family)
    scorer, brute_force = make_scorer(folder, context_prefix=context_prefix)
    for row, found in zip(ROWS, score(scorer, ROWS), strict=True):
        expected = brute_force(*row)
        assert isinstance(found, Score), row
        assert found.n_tokens == expected.n_tokens, row
        assert found.nll_sum_nats == pytest.approx(expected.nll_sum_nats, abs=1e-4 * expected.n_tokens), row


def test_soft_cap_is_not_ignored(tmp_path: Path) -> None:
    """Without this, the parity of Gemma-2 could hold because its cap does nothing."""
    capped, _ = make_scorer(tiny_models.make_model_folder(tmp_path, "gemma2", name="capped"))
    free, _ = make_scorer(tiny_models.make_model_folder(tmp_path, "gemma2", name="free", final_logit_softcapping=None))
    one, other = score(capped, ROWS[:1])[0], score(free, ROWS[:1])[0]
    assert isinstance(one, Score)
    assert isinstance(other, Score)
    assert abs(one.nll_sum_nats - other.nll_sum_nats) > 0.1


def test_every_byte_counts_with_a_prefix_token(llama: Path) -> None:
    scorer, _ = make_scorer(llama, context_prefix="token")
    for row, found in zip(ROWS, score(scorer, ROWS), strict=True):
        assert isinstance(found, Score)
        assert found.n_bytes == len(row[0].encode())


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 64, 100_000])
def test_batch_size_and_order_do_not_matter(llama: Path, tokens_per_batch: int) -> None:
    expected = score(make_scorer(llama, 64)[0], ROWS)
    order = [4, 2, 6, 0, 5, 3, 1]
    found = score(make_scorer(llama, tokens_per_batch)[0], [ROWS[i] for i in order])
    for position, row in enumerate(order):
        one, other = found[position], expected[row]
        assert isinstance(one, Score)
        assert isinstance(other, Score)
        assert one.nll_sum_nats == pytest.approx(other.nll_sum_nats, abs=1e-4)
        assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)


@pytest.mark.parametrize("n_rows", [0, 1, 4, 5])
def test_slices_hold_every_row(llama: Path, n_rows: int) -> None:
    scorer, _ = make_scorer(llama)
    scorer.slice_bytes = 4 * len("hello world")
    rows: list[tuple[str, list[int], bool]] = [(f"hello worl{i}", [], True) for i in range(n_rows)]
    found = score(scorer, rows)
    assert len(found) == n_rows
    for one, row in zip(found, rows, strict=True):
        alone = score(scorer, [row])[0]
        assert isinstance(one, Score)
        assert isinstance(alone, Score)
        assert one.nll_sum_nats == pytest.approx(alone.nll_sum_nats, abs=1e-4)


def test_special_tokens_in_text_are_ordinary_text(llama: Path) -> None:
    scorer, _ = make_scorer(llama)
    found = score(scorer, [("a<|endoftext|>", [], False)])[0]
    assert isinstance(found, Score)
    assert found.n_tokens > 5


def test_failures_stand_at_their_rows(llama: Path) -> None:
    scorer, _ = make_scorer(llama)
    found = score(scorer, [("hello", [], True), ("", [], True), ("bad \ud800", [], True), ("world", [], True)])
    assert isinstance(found[0], Score)
    assert isinstance(found[3], Score)
    assert [one.reason for one in found if isinstance(one, Failure)] == ["no_tokens", "tokenizer_failed"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_is_a_failure_of_that_text_alone(llama: Path, poison: float) -> None:
    scorer, _ = make_scorer(llama)
    tokenizer = load_tokenizer(llama)
    bad = tokenizer.encode("~", add_special_tokens=False).ids[0]
    assert scorer._head.decoder is not None
    embedding = scorer._head.decoder.get_input_embeddings()
    with torch.inference_mode():
        embedding.weight[bad] = poison
    found = score(scorer, [("hello", [], True), ("he~llo", [], True)])
    assert isinstance(found[1], Failure)
    assert found[1].reason == "nan_score"
    # The output layer is not tied in this model: only rows that hold the token are hurt.
    assert isinstance(found[0], Score)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried")],
)
def test_a_batch_that_does_not_fit_is_split(llama: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score(make_scorer(llama, 100_000)[0], ROWS)
    scorer, _ = make_scorer(llama, 100_000)
    hidden = scorer._head.hidden

    def limited(input_BT: torch.Tensor) -> torch.Tensor:
        if input_BT.numel() > 40:
            raise error
        return hidden(input_BT)

    monkeypatch.setattr(scorer._head, "hidden", limited)
    for one, other in zip(score(scorer, ROWS), expected, strict=True):
        assert isinstance(one, Score)
        assert isinstance(other, Score)
        assert one.nll_sum_nats == pytest.approx(other.nll_sum_nats, abs=1e-4)


def test_a_text_that_does_not_fit_alone_fails_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, _ = make_scorer(llama, 100_000)
    hidden = scorer._head.hidden

    def limited(input_BT: torch.Tensor) -> torch.Tensor:
        if input_BT.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(input_BT)

    monkeypatch.setattr(scorer._head, "hidden", limited)
    found = score(scorer, [("hello", [], True), ("x" * 70, [], True), ("world", [], True)])
    assert [type(one) for one in found] == [Score, Failure, Score]
    assert isinstance(found[1], Failure)
    assert found[1].reason == "out_of_memory"


def test_other_errors_are_raised(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, _ = make_scorer(llama)
    monkeypatch.setattr(scorer._head, "hidden", lambda input_BT: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        score(scorer, ROWS[:1])


def test_progress_counts_the_scored_tokens(llama: Path) -> None:
    scorer, _ = make_scorer(llama)
    counted: list[int] = []
    scorer.on_progress = counted.append
    found = score(scorer, ROWS)
    assert sum(counted) == sum(one.n_tokens for one in found if isinstance(one, Score))
