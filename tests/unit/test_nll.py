"""The function behind `nll_udf`, called with Arrow arrays: a struct a row, nulls where there is no score."""

import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, ScoringError
from miniplm_udf.scores.nll import NLL_TYPE, _model_config, nll_arrow
from miniplm_udf.scoring.results import Failure, Score
from tests.support.score_tables import FakeScorer


class EndsScorer(FakeScorer):
    """The fake of the score job's tests, for texts that a job never hands over, and with an eye on document ends."""

    def __init__(self) -> None:
        super().__init__(1.0, "/dev/null")

    def score(self, texts, segment_ends, ends_document):  # type: ignore[no-untyped-def]
        scores = super().score([text or "fail" for text in texts], segment_ends, ends_document)
        return [
            one if isinstance(one, Failure) else Score(one.nll_sum_nats + 0.5 * ends, one.n_tokens, one.n_bytes)
            for one, ends in zip(scores, ends_document, strict=True)
        ]


def run(arrays: list[pa.Array], ends_document: bool = False) -> list[dict[str, float] | None]:
    results = list(nll_arrow(EndsScorer, ends_document)(iter(arrays)))
    assert all(array.type == NLL_TYPE for array in results)
    return [row for array in results for row in array.to_pylist()]


def expected(text: str) -> dict[str, float]:
    nll = sum(text.encode()) / 100
    return {"nll_sum_nats": nll, "n_tokens": len(text.split()), "n_bytes": len(text.encode())}


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 1, 0], [2, 3, 2], [300, 1]])
def test_every_score_is_at_its_row(sizes: list[int]) -> None:
    texts = [[f"text {batch} {row} é" for row in range(size)] for batch, size in enumerate(sizes)]
    rows = run([pa.array(batch, pa.string()) for batch in texts])
    assert rows == [expected(text) for batch in texts for text in batch]


def test_no_score_is_null_and_not_a_struct_of_nulls() -> None:
    texts = ["first one", None, "", "nan one", "inf one", "fail one", "last one"]
    rows = run([pa.array(texts[:3], pa.string()), pa.array(texts[3:], pa.large_string())])
    assert rows == [expected("first one"), None, None, None, None, None, expected("last one")]


def test_ends_document_is_told_to_the_scorer() -> None:
    (row,) = run([pa.array(["a text"])], ends_document=True)
    assert row is not None
    assert row["nll_sum_nats"] == expected("a text")["nll_sum_nats"] + 0.5


def test_a_column_that_is_no_text_is_named() -> None:
    with pytest.raises(ScoringError, match="column of strings, found one of int64"):
        run([pa.array([1, 2])])


def test_rows_are_taken_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is never read as a whole before its first score."""
    taken = 0

    def arrays() -> Iterator[pa.Array]:
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield pa.array(["x" * 200_000] * 5)

    next(iter(nll_arrow(EndsScorer, True)(arrays())))
    assert taken < 100


def test_settings_are_those_of_a_model() -> None:
    config = _model_config("some/name", {"context_tokens": 64, "window_overlap_tokens": 8, "dtype": "bfloat16"})
    assert config == ModelConfig(path="some/name", context_tokens=64, window_overlap_tokens=8, dtype="bfloat16")
    with pytest.raises(ConfigError, match="unknown setting context_token; did you mean 'context_tokens'"):
        _model_config("some/name", {"context_token": 64})
    with pytest.raises(ConfigError, match="context_tokens: expected at least 2"):
        _model_config("some/name", {"context_tokens": 1})


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import miniplm_udf", "torch transformers pyspark pyarrow pandas numpy"),
        ("from miniplm_udf import nll_udf", "torch transformers pyspark"),
    ],
)
def test_what_is_not_loaded(statement: str, forbidden: str) -> None:
    code = f"import sys; {statement}; print([m for m in {forbidden.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_has_no_other_surprises() -> None:
    import miniplm_udf

    assert miniplm_udf.nll_udf is miniplm_udf.scores.nll.nll_udf
    with pytest.raises(AttributeError, match="has no attribute 'nll_uff'"):
        miniplm_udf.nll_uff  # noqa: B018
