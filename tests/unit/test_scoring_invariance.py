"""A score does not depend on batches, order, partitions, workers, threads or padding; and the limits of one pass."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from miniplm_udf.scoring.results import Score
from miniplm_udf.workers.arrow import score_arrow
from tests.support import tiny_models
from tests.support.scoring_oracles import CONTEXT, OVERLAP, ROWS, Row, plain_tokenizer, score, sequence
from tests.support.tiny_models import decoder_of, make_model_folder, make_scorer

NATS_PER_TOKEN = 1e-5
_WORDS = ("the quick", " brown", " fox", "!\n\n", " é", "😀", "xyzzy", "  ", " 2024", " over the lazy dog.")


def made_rows(n_rows: int = 40) -> list[Row]:
    """Rows of 1 to 60 words, some of two documents; a function of their number."""
    generator = random.Random(0)
    rows: list[Row] = list(ROWS)
    while len(rows) < n_rows:
        parts = generator.choices(_WORDS, k=generator.randint(1, 60))
        cut = generator.randint(0, len(parts))
        ends = [len("".join(parts[:cut]).encode())] if generator.random() < 0.3 else []
        rows.append(("".join(parts), ends, generator.random() < 0.5))
    return rows


def check_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Score), one
        assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)
        assert abs(one.nll_sum_nats - other.nll_sum_nats) <= NATS_PER_TOKEN * one.n_tokens


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "mamba"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make_model_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    """Each row alone, in a pass of its own: no padding, no neighbours."""
    scorer = make_scorer(folder)
    return [score(scorer, [row])[0] for row in made_rows()]


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_batch", [1, 50, 300, 100_000])
def test_batches_and_order(folder: Path, expected: list[Any], tokens_per_batch: int) -> None:
    rows = made_rows()
    order = list(range(len(rows)))
    random.Random(tokens_per_batch).shuffle(order)
    found = score(make_scorer(folder, tokens_per_batch), [rows[number] for number in order])
    check_equal(found, [expected[number] for number in order])


@pytest.mark.slow
@pytest.mark.parametrize(("n_workers", "rows_per_batch"), [(1, 40), (2, 3), (7, 1), (3, 1000)])
def test_partitions_and_workers(folder: Path, expected: list[Any], n_workers: int, rows_per_batch: int) -> None:
    """Rows dealt out to workers, each with a scorer of its own, in record batches of any size."""
    rows = made_rows()
    order = list(range(len(rows)))
    random.Random(n_workers).shuffle(order)
    found: dict[int, dict[str, Any]] = {}
    for worker in range(n_workers):
        own = order[worker::n_workers]
        table = pa.table(
            {
                "instance_id": [str(number) for number in own],
                "text": [rows[number][0] for number in own],
                "segment_ends": pa.array([rows[number][1] for number in own], pa.list_(pa.int32())),
                "ends_document": [rows[number][2] for number in own],
                "model_ids": pa.array([["m"]] * len(own), pa.list_(pa.string())),
            }
        )
        run = score_arrow({"m": lambda: make_scorer(folder, 200)})
        for batch in run(iter(table.to_batches(max_chunksize=rows_per_batch))):
            found |= {int(row["instance_id"]): row for row in batch.to_pylist()}
    numbers = [found[number] for number in range(len(rows))]
    check_equal([Score(one["nll_sum_nats"], one["n_tokens"], one["n_bytes"]) for one in numbers], expected)


@pytest.mark.slow
def test_threads(folder: Path, expected: list[Any]) -> None:
    """Workers that share a machine have fewer threads each: sums are then added up in another order."""
    torch.set_num_threads(2)
    try:
        check_equal(score(make_scorer(folder, 1000), made_rows()), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_what_stands_in_the_padding(folder: Path, expected: list[Any]) -> None:
    """Every input is followed by other tokens than it was, as if by worse padding."""
    scorer = make_scorer(folder, 400)
    n_longer = 0

    def poison(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal n_longer
        input_BT = named["input_ids"] if "input_ids" in named else arguments[0]
        padding_BT = (input_BT == 0).flip(1).cummin(dim=1).values.flip(1)  # zeros to the right of all else
        padding_BT[:, 0] = False
        n_longer += int(padding_BT.sum())
        # The last zero may be an input separator: it is not scored from, so it may change as well.
        changed = torch.where(padding_BT, torch.randint(1, tiny_models.VOCAB_SIZE, input_BT.shape), input_BT)
        return (), {**named, "input_ids": changed}

    with decoder_of(scorer).register_forward_pre_hook(poison, with_kwargs=True):
        found = score(scorer, made_rows())
    assert n_longer > 100
    check_equal(found, expected)


# --- what a forward pass is given ---


def seen_inputs(scorer: Any, rows: list[Row]) -> list[torch.Tensor]:
    """The inputs of all forward passes of a scoring."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["input_ids"] if "input_ids" in named else arguments[0])

    with decoder_of(scorer).register_forward_pre_hook(keep, with_kwargs=True):
        score(scorer, rows)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_batch", [10, 100, 1000])
def test_no_pass_is_longer_than_the_context_or_larger_than_the_budget(folder: Path, tokens_per_batch: int) -> None:
    seen = seen_inputs(make_scorer(folder, tokens_per_batch), made_rows())
    assert max(input_BT.shape[1] for input_BT in seen) == CONTEXT
    assert all(input_BT.numel() <= tokens_per_batch or len(input_BT) == 1 for input_BT in seen)
    assert tokens_per_batch == 10 or max(len(input_BT) for input_BT in seen) > 4


def test_the_rows_of_all_passes_are_the_windows_of_all_texts(folder: Path) -> None:
    """Counted from the ids: 1 + ceil((n - 1 - 24) / 18) windows of n ids, less the few in which nothing is scored."""
    rows = made_rows()
    tokenizer = plain_tokenizer(folder)
    lengths = [len(sequence(tokenizer, row, 0, None).ids) - 1 for row in rows]
    n_windows = sum(1 + max(0, -(-(length - CONTEXT) // (CONTEXT - OVERLAP))) for length in lengths)
    seen = seen_inputs(make_scorer(folder, 200), rows)
    assert n_windows * 0.9 <= sum(len(input_BT) for input_BT in seen) <= n_windows


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 23, 24, 25, 42, 43, 1000])
def test_every_token_of_a_long_text_counts_once(folder: Path, n_tokens: int) -> None:
    """No merge joins two "q": each is a token of one byte."""
    scorer = make_scorer(folder, 100, context_prefix="token")
    counted: list[int] = []
    scorer.on_progress = counted.append
    [found] = score(scorer, [("q" * n_tokens, [], True)])
    assert found.n_tokens == n_tokens == sum(counted) == found.n_bytes


def test_the_sum_over_windows_is_the_sum_of_its_parts(folder: Path) -> None:
    """Without overlap a long text scores as its windows do as texts of their own, one token of context aside."""
    scorer = make_scorer(folder, 100, context_tokens=10, window_overlap_tokens=0)
    text = "".join(np.random.default_rng(0).choice(list("qzjv"), size=51))
    [whole] = score(scorer, [(text, [], False)])
    parts = score(scorer, [(text[start : start + 11], [], False) for start in range(0, 50, 10)])
    assert whole.n_tokens == sum(part.n_tokens for part in parts) == 50
    assert whole.nll_sum_nats == pytest.approx(sum(part.nll_sum_nats for part in parts), abs=50 * NATS_PER_TOKEN)
