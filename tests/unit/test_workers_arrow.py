"""The Arrow functions, called with record batches: every score at its row, failures as data. Fake scorers."""

import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from miniplm_udf.errors import ScoringError
from miniplm_udf.scoring.results import Failure, Generation, Score
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.engine import MAX_ERRORS_IN_A_ROW
from miniplm_udf.workers.messages import GENERATED_SCHEMA, SCORE_REQUEST_SCHEMA, SCORED_SCHEMA
from miniplm_udf.workers.score_counts import ScoreCounts
from tests.support.poison import Panic


class RowScorer:
    """A score that is a function of the row, so that one at the wrong row shows."""

    slice_bytes = 40

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls: list[int] = []

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> list[Any]:
        self.calls.append(len(texts))
        return [
            Failure("no_tokens", f"found {text!r}")
            if not text
            else Score(self.factor * sum(text.encode()) + sum(ends) + 0.5 * ended, len(text), len(text.encode()))
            for text, ends, ended in zip(texts, segment_ends, ends_document, strict=True)
        ]


@dataclasses.dataclass
class RowFactory:
    """Has no key: called in this process."""

    factor: float
    made: list[RowScorer] = dataclasses.field(default_factory=list)

    def __call__(self) -> RowScorer:
        self.made.append(RowScorer(self.factor))
        return self.made[-1]


@dataclasses.dataclass
class KeyedRowFactory(RowFactory):
    """Called in a scorer process."""

    @property
    def key(self) -> str:
        return f"fake/{self.factor}"


# Both ways must do the same.
both_ways = pytest.mark.parametrize("make", [RowFactory, KeyedRowFactory])


def request(rows: int, aliases: Sequence[str] = ("teacher",)) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [
            {
                "instance_id": f"id{row}",
                "text": f"text number {row} é",
                "segment_ends": [row % 5],
                "ends_document": row % 2 == 0,
                "model_ids": list(aliases),
            }
            for row in range(rows)
        ],
        schema=SCORE_REQUEST_SCHEMA,
    )


@both_ways
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 20])
def test_every_score_is_at_its_row(rows: int, make: type[RowFactory]) -> None:
    factories = {"teacher": make(1.0), "reference": make(2.0)}
    batches = list(score_arrow(factories)(iter([request(rows, ["teacher", "reference"])])))
    found = {(row["instance_id"], row["model_id"]): row for batch in batches for row in batch.to_pylist()}
    assert len(found) == sum(batch.num_rows for batch in batches) == 2 * rows
    for row in range(rows):
        text = f"text number {row} é"
        for alias, factor in (("teacher", 1.0), ("reference", 2.0)):
            one = found[f"id{row}", alias]
            assert one["nll_sum_nats"] == factor * sum(text.encode()) + row % 5 + 0.5 * (row % 2 == 0)
            assert (one["n_tokens"], one["n_bytes"]) == (len(text), len(text.encode()))
            assert (one["reason"], one["detail"]) == (None, None)
    assert all(batch.schema == SCORED_SCHEMA for batch in batches)
    if rows == 20 and make is RowFactory:
        assert max(factories["teacher"].made[0].calls) <= 3, "slices of about 40 bytes"


@both_ways
def test_a_row_is_scored_by_the_models_it_names(make: type[RowFactory]) -> None:
    batch = pa.RecordBatch.from_pylist(
        [
            {"instance_id": "a", "text": "x", "model_ids": ["teacher"], "segment_ends": [], "ends_document": True},
            {"instance_id": "b", "text": "y", "model_ids": ["reference"], "segment_ends": None, "ends_document": None},
            {"instance_id": "c", "text": "z", "model_ids": [], "segment_ends": [], "ends_document": True},
            {"instance_id": "d", "text": "w", "model_ids": ["reference", "teacher"], "segment_ends": [1]},
        ],
        schema=SCORE_REQUEST_SCHEMA,
    )
    factories = {"teacher": make(1.0), "reference": make(2.0)}
    rows = [row for out in score_arrow(factories)(iter([batch])) for row in out.to_pylist()]
    assert {(row["instance_id"], row["model_id"], row["nll_sum_nats"]) for row in rows} == {
        ("a", "teacher", ord("x") + 0.5),
        ("d", "teacher", ord("w") + 1.0),
        ("b", "reference", 2.0 * ord("y")),
        ("d", "reference", 2.0 * ord("w") + 1.0),
    }


@both_ways
def test_failures_are_rows_without_numbers(make: type[RowFactory]) -> None:
    batch = pa.RecordBatch.from_pylist(
        [{"instance_id": f"i{n}", "text": text, "model_ids": ["teacher"]} for n, text in enumerate(["a", "", None])],
        schema=SCORE_REQUEST_SCHEMA,
    )
    rows = [row for out in score_arrow({"teacher": make(1.0)})(iter([batch])) for row in out.to_pylist()]
    assert [row["reason"] for row in rows] == [None, "no_tokens", "no_tokens"]
    assert [row["nll_sum_nats"] for row in rows] == [float(ord("a")), None, None]
    assert [row["n_tokens"] for row in rows] == [1, None, None]
    assert rows[2]["detail"] == "found None"


def test_a_score_that_is_no_number_is_a_failure_and_the_tally_counts() -> None:
    class Broken(RowScorer):
        def score(self, texts: Sequence[str | None], *rest: Any) -> list[Any]:
            odd = {"a": math.nan, "b": math.inf}
            return [
                Score(odd.get(str(text), 2.0), 5, 1) if text else Failure("no_tokens", "x" * 2000) for text in texts
            ]

    totals: list[ScoreCounts] = []
    sink = SimpleNamespace(add=totals.append)
    run = score_arrow({"teacher": lambda: Broken(1.0)}, sink=sink)
    rows = [row for out in run(iter([texts_request("a", "b", "", "c", "d")])) for row in out.to_pylist()]
    assert [row["reason"] for row in rows] == ["nan_score", "nan_score", "no_tokens", None, None]
    assert [row["nll_sum_nats"] for row in rows] == [None, None, None, 2.0, 2.0]
    (total,) = totals
    counts = total.models["teacher"]
    assert (counts.n_scored, counts.n_failed, counts.n_tokens) == (2, 3, 10)
    assert counts.seconds > 0
    assert [(instance, reason, len(detail or "")) for instance, _, reason, detail in total.failed] == [
        ("id0", "nan_score", 0), ("id1", "nan_score", 0), ("id2", "no_tokens", 1000),
    ]  # fmt: skip
    assert pickle.loads(pickle.dumps(total)) == total


@both_ways
def test_columns_are_carried_along(make: type[RowFactory]) -> None:
    batch = request(7).append_column("source", pa.array([f"s{i}" for i in range(7)]))
    batch = batch.append_column("size", pa.array(range(7), pa.int64()))
    model_ids = pa.array([["teacher"] if i % 2 else ["reference", "teacher"] for i in range(7)])
    batch = batch.set_column(4, "model_ids", model_ids)
    factories = {"teacher": make(1.0), "reference": make(2.0)}
    outs = list(score_arrow(factories, ["size", "source"])(iter([batch])))
    assert all(out.schema.names == [*SCORED_SCHEMA.names, "size", "source"] for out in outs)
    rows = [row for out in outs for row in out.to_pylist()]
    assert len(rows) == 7 + 4
    assert all(row["instance_id"] == f"id{row['size']}" and row["source"] == f"s{row['size']}" for row in rows)


def texts_request(*texts: str | None) -> pa.RecordBatch:
    rows = [{"instance_id": f"id{n}", "text": text, "model_ids": ["teacher"]} for n, text in enumerate(texts)]
    return pa.RecordBatch.from_pylist(rows, schema=SCORE_REQUEST_SCHEMA)


@both_ways
@pytest.mark.parametrize(
    ("batches", "sizes"),
    [
        ([], []),
        ([[]], []),
        ([[], ["a" * 5], []], [1]),
        # 40 bytes a slice: small batches are joined, large ones cut, and the rest is not lost.
        ([["a" * 10]] * 9, [4, 4, 1]),
        ([["a" * 10] * 9], [4, 4, 1]),
        ([["a" * 10] * 4], [4]),
        ([["a" * 10] * 5], [4, 1]),
        ([["a" * 10] * 3, ["a" * 10] * 6, [""], [None], ["a" * 100, "a"]], [4, 4, 4, 1]),
        ([["a" * 100], ["a" * 100] * 2], [1, 1, 1]),
        ([[None, ""]], [2]),
    ],
)
def test_slices_are_full_whatever_the_batches(
    batches: list[list[str | None]], sizes: list[int], make: type[RowFactory]
) -> None:
    factory = make(1.0)
    outs = list(score_arrow({"teacher": factory})(texts_request(*batch) for batch in batches))
    assert [out.num_rows for out in outs] == sizes
    if make is RowFactory:
        assert [factory.made[0].calls if factory.made else []] == [sizes]
    rows = [row for out in outs for row in out.to_pylist()]
    everything = [(f"id{n}", text) for batch in batches for n, text in enumerate(batch)]
    assert [row["instance_id"] for row in rows] == [instance_id for instance_id, _ in everything]
    assert [row["n_tokens"] for row in rows] == [len(text) if text else None for _, text in everything]


class TokenizingScorer(RowScorer):
    """Tokens are a text's bytes; says who tokenized and in which thread."""

    def __init__(self, factor: float, tokenizer_hash: str) -> None:
        super().__init__(factor)
        self.tokenizer_hash = tokenizer_hash
        self.tokenized: list[str | None] = []
        self.threads: set[str] = set()

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Any]:
        self.tokenized.extend(texts)
        self.threads.add(threading.current_thread().name)
        return list(zip(texts, segment_ends, strict=True))

    def score_tokenized(self, tokenized: Sequence[Any], ends_document: Sequence[bool]) -> list[Any]:
        assert threading.current_thread() is threading.main_thread()
        return self.score([text for text, _ in tokenized], [ends for _, ends in tokenized], ends_document)


def test_a_text_is_tokenized_once_for_all_scorers_of_a_tokenizer_and_in_the_thread() -> None:
    scorers = {"a": TokenizingScorer(1.0, "x"), "b": TokenizingScorer(2.0, "x"), "c": TokenizingScorer(3.0, "y")}
    factories = {alias: (lambda alias=alias: scorers[alias]) for alias in scorers}
    batches = [request(21, ["a", "b", "c"]), request(5, ["b", "a"])]  # seven slices, and what "c" has no use for
    rows = [row for out in score_arrow(factories)(iter(batches)) for row in out.to_pylist()]
    by_text = {alias: len(scorer.tokenized) for alias, scorer in scorers.items()}
    assert by_text["a"] + by_text["b"] == 26
    assert by_text["c"] == 21
    assert set().union(*(scorer.threads for scorer in scorers.values())) == {"read-ahead"}
    factors = {"a": 1.0, "b": 2.0, "c": 3.0}
    for row in rows:
        n = int(row["instance_id"][2:])
        bare = sum(f"text number {n} é".encode())
        assert row["nll_sum_nats"] == factors[row["model_id"]] * bare + n % 5 + 0.5 * (n % 2 == 0)


def test_tokenized_rows_go_to_the_models_that_want_them() -> None:
    batch = request(12).set_column(4, "model_ids", pa.array([["a", "b"], ["b"], ["a"], []] * 3, pa.list_(pa.string())))
    shared = {"a": TokenizingScorer(1.0, "x"), "b": TokenizingScorer(2.0, "x")}
    factories = {alias: (lambda alias=alias: shared[alias]) for alias in shared}
    rows = [row for out in score_arrow(factories)(iter([batch])) for row in out.to_pylist()]
    expected = {(f"id{n}", alias) for n in range(12) for alias in batch.column("model_ids")[n].as_py()}
    assert len(rows) == len(expected)
    assert {(row["instance_id"], row["model_id"]) for row in rows} == expected
    for row in rows:
        n = int(row["instance_id"][2:])
        bare = {"a": 1.0, "b": 2.0}[row["model_id"]] * sum(f"text number {n} é".encode())
        assert row["nll_sum_nats"] == bare + n % 5 + 0.5 * (n % 2 == 0)


def test_a_model_that_only_a_later_row_names_is_made_then() -> None:
    early, late = TokenizingScorer(1.0, "x"), TokenizingScorer(2.0, "x")
    made: list[str] = []
    factories = {"a": lambda: made.append("a") or early, "b": lambda: made.append("b") or late}
    run = score_arrow(factories)(iter([request(3, ["a"]), request(3, ["b"])]))
    assert next(run)["model_id"].to_pylist() == ["a"] * 3
    assert made == ["a"]
    rows = [row for out in run for row in out.to_pylist()]
    assert [(row["instance_id"], row["model_id"]) for row in rows] == [(f"id{n}", "b") for n in range(3)]
    assert made == ["a", "b"]


def test_errors_of_the_thread_are_raised_as_they_were_and_no_thread_is_left() -> None:
    class RefusingTokenizer(TokenizingScorer):
        def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Any]:
            raise ScoringError("the tokenizer is broken")

    def failing() -> Iterator[pa.RecordBatch]:
        yield request(2)
        raise ConnectionError("Spark is gone")

    before = threading.active_count()
    with pytest.raises(ScoringError, match="broken"):
        list(score_arrow({"teacher": lambda: RefusingTokenizer(1.0, "x")})(iter([request(2)])))
    with pytest.raises(ConnectionError, match="gone"):
        list(score_arrow({"teacher": RowFactory(1.0)})(failing()))
    # A consumer that stops early, as under a LIMIT.
    run = score_arrow({"teacher": RowFactory(1.0)})(request(5) for _ in range(1000))
    assert isinstance(run, Generator)
    next(run)
    run.close()
    assert threading.active_count() == before


def test_waiting_for_input_is_told_from_scoring() -> None:
    class SlowScorer(RowScorer):
        def score(self, *columns: Any) -> list[Any]:
            time.sleep(0.02)
            return super().score(*columns)

    def wait_share(seconds: float, n_slices: int = 6) -> float | None:
        def source() -> Iterator[pa.RecordBatch]:
            for _ in range(n_slices):
                time.sleep(seconds)
                yield request(3)

        totals: list[ScoreCounts] = []
        list(score_arrow({"teacher": lambda: SlowScorer(1.0)}, sink=SimpleNamespace(add=totals.append))(source()))
        assert totals[0].models["teacher"].seconds >= 0.02 * n_slices
        return totals[0].wait_share

    assert (wait_share(0.0) or 0.0) < 0.3
    assert (wait_share(0.06) or 0.0) > 0.5
    assert wait_share(0.0, n_slices=1) is None
    # The first slice does not count, whichever models scored it.
    totals: list[ScoreCounts] = []
    factories = {"teacher": lambda: SlowScorer(1.0), "reference": lambda: SlowScorer(2.0)}
    sink = SimpleNamespace(add=totals.append)
    list(score_arrow(factories, sink=sink)(iter([request(3, ["teacher", "reference"])])))
    assert totals[0].wait_share is None


def test_a_factory_without_a_key_is_called_once_a_call() -> None:
    made: list[int] = []

    def factory() -> RowScorer:
        made.append(1)
        return RowScorer(1.0)

    run = score_arrow({"teacher": factory})
    list(run(iter([request(3), request(3)])))
    assert len(made) == 1
    list(run(iter([request(3)])))
    assert len(made) == 2


@both_ways
def test_an_unknown_alias_raises(make: type[RowFactory]) -> None:
    with pytest.raises(ScoringError, match="found 'other'"):
        list(score_arrow({"teacher": make(1.0)})(iter([request(1, ["other"])])))


def test_lost_rows_raise() -> None:
    class Loser(RowScorer):
        def score(self, *columns: Any) -> list[Any]:
            return super().score(*columns)[1:]

    with pytest.raises(ScoringError, match="lost rows"):
        list(score_arrow({"teacher": lambda: Loser(1.0)})(iter([request(2)])))


class Poisoned(TokenizingScorer):
    """Raises on some texts: in the tokenizer, with what a panic of a Rust library is, or in the model."""

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Any]:
        if any("panic" in str(text) for text in texts):
            raise Panic("index out of bounds")
        return super().tokenize(texts, segment_ends)

    def score(self, texts: Sequence[str | None], *rest: Any) -> list[Any]:
        if any("raise" in str(text) for text in texts):
            raise KeyError("a token")
        return super().score(texts, *rest)


def test_a_text_that_the_scorer_raises_on_is_found_and_the_rest_is_scored() -> None:
    good = [f"t{n}" for n in range(40)]
    texts = [*good[:7], "panic a", *good[7:30], "raise b", "panic c", *good[30:], "raise d"]
    totals: list[ScoreCounts] = []
    run = score_arrow({"teacher": lambda: Poisoned(1.0, "x")}, sink=SimpleNamespace(add=totals.append))
    rows = [row for out in run(iter([texts_request(*texts)])) for row in out.to_pylist()]
    assert [row["instance_id"] for row in rows] == [f"id{n}" for n in range(len(texts))]
    for text, row in zip(texts, rows, strict=True):
        if text in good:
            assert (row["nll_sum_nats"], row["reason"]) == (sum(text.encode()), None)
        else:
            assert (row["nll_sum_nats"], row["n_tokens"], row["reason"]) == (None, None, "scorer_error")
            assert row["detail"] == ("Panic: index out of bounds" if "panic" in text else "KeyError: 'a token'")
    counts = totals[0].models["teacher"]
    assert (counts.n_scored, counts.n_failed, counts.n_tokens) == (40, 4, sum(map(len, good)))
    assert len(totals[0].failed) == 4


@pytest.mark.parametrize(("n_bad", "raises"), [(MAX_ERRORS_IN_A_ROW - 1, False), (MAX_ERRORS_IN_A_ROW, True)])
def test_a_scorer_that_raises_on_everything_is_an_error_and_rejects_nothing(n_bad: int, raises: bool) -> None:
    run = score_arrow({"teacher": lambda: Poisoned(1.0, "x")})
    texts = ["fine", *["raise"] * n_bad, "fine", *["panic"] * (MAX_ERRORS_IN_A_ROW - 1)]
    if raises:
        with pytest.raises(ScoringError, match=f"{n_bad} texts in a row cannot be scored, the last for KeyError"):
            list(run(iter([texts_request(*texts)])))
    else:
        rows = [row for out in run(iter([texts_request(*texts)])) for row in out.to_pylist()]
        assert sum(row["reason"] is None for row in rows) == 2


@pytest.mark.parametrize(
    "module", ["miniplm_udf.workers.arrow", "miniplm_udf.scoring.description", "miniplm_udf.scoring.tokenizer"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'pyspark') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class FakeGenerator:
    """Continues a text by its id; refuses, breaks on or dies of some texts."""

    tokenizer_hash, slice_bytes = "fake", 40

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[str]:
        return [str(text) for text in texts]

    def generate(self, tokenized: Sequence[str], ends_document: Sequence[bool], ids: Sequence[str]) -> list[Any]:
        if any("kill" in text for text in tokenized):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("raise" in text for text in tokenized):
            raise ValueError("broken")
        return [
            Failure("no_tokens", "refused")
            if "refuse" in text
            else Generation(f"{text} {name}    ".encode()[:-3], 2, "length")
            for text, name in zip(tokenized, ids, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class GeneratorFactory:
    key: str = "fake generator"

    def __call__(self) -> FakeGenerator:
        return FakeGenerator()


@pytest.mark.slow  # starts a process after each of three kills
def test_a_generator_gets_the_ids_and_its_rows_come_out() -> None:
    texts = ["a", "b", "refuse", "c", "raise", "d", "kill", *"efghij"]
    rows = [
        {"instance_id": f"id{n}", "text": text, "segment_ends": [], "ends_document": True, "model_ids": ["teacher"]}
        for n, text in enumerate(texts)
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=SCORE_REQUEST_SCHEMA)
    totals: list[ScoreCounts] = []
    sink = SimpleNamespace(add=totals.append)
    function = score_arrow({"teacher": GeneratorFactory()}, ("text",), sink, GENERATED_SCHEMA)
    batches = list(function(iter([batch])))
    assert all(out.schema.names == [*GENERATED_SCHEMA.names, "text"] for out in batches)
    results_by_id = {row["instance_id"]: row for out in batches for row in out.to_pylist()}
    assert {row["text"]: row["reason"] for row in results_by_id.values() if row["reason"]} == {
        "refuse": "no_tokens", "raise": "scorer_error", "kill": "scorer_crashed",
    }  # fmt: skip
    for n, text in enumerate(texts):
        row = results_by_id[f"id{n}"]
        assert row["text"] == text
        if row["reason"] is None:
            assert row["token_ids"] == f"{text} id{n} ".encode()
            assert (row["n_prompt_tokens"], row["end_reason"]) == (2, "length")
            assert row["n_tokens"] == len(row["token_ids"]) // 4 - 2
        else:
            assert (row["token_ids"], row["n_tokens"], row["end_reason"]) == (None, None, None)
    assert (totals[0].of("teacher").n_scored, totals[0].of("teacher").n_failed) == (10, 3)
