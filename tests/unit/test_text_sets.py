"""External sets of texts: which files belong to a set, which rows are bad, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from deltalake import write_deltalake

from miniplm_udf.config.evaluate import PAPER_TASKS, EvaluateConfig, TextInputConfig, task_columns
from miniplm_udf.config.experiment import load_config
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.ingestion.text_sets import BadRow, TextSet, open_text_set, state_of

DEMO = Path(__file__).resolve().parents[2] / "conf/demo.yaml"


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text, "source": text[0]}).encode() + b"\n" for text in texts)


def opened(path: Path | str, **keys: Any) -> TextSet:
    text_set = open_text_set("mine", TextInputConfig(path=str(path), **keys))
    text_set.check_columns()
    return text_set


def read(path: Path | str, **keys: Any) -> list[tuple[str, str]]:
    """Text and source of each document, reason and place of each bad row."""
    rows = opened(path, **keys).rows()
    return [(row.reason, row.place) if isinstance(row, BadRow) else (row.text, row.source) for row in rows]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.jsonl.zst").write_bytes(zstandard.compress(lines("three")) + zstandard.compress(lines("3b")))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines("four")) + gzip.compress(lines("five")))
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".a.jsonl.crc").touch()
    assert [text for text, _ in read(tmp_path)] == ["one", "two", "three", "3b", "four", "five"]
    assert [text for text, _ in read(f"{tmp_path}/*.jsonl")] == ["one", "two"]
    assert read(tmp_path / "a.jsonl") == [("one", "o"), ("two", "t")]


def test_every_format_says_which_rows_are_bad(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"text": "x"}\n\n{oops\n"s"\n\xff\n{"text": null}\n{"text": 3}\n{"text": ""}\n{"text": "\\u0000"}'
    )
    places = {number: f"{file} line {number}" for number in range(3, 10)}
    reasons = ["invalid_json", "not_an_object", "invalid_utf8", "missing_text", "text_not_string", "empty_text"]
    assert read(file) == [("x", "mine"), *zip([*reasons, "nul_byte"], places.values(), strict=True)]
    pq.write_table(pa.table({"text": ["x", None, ""], "source": ["s", "s", "s"]}), tmp_path / "a.parquet")
    place = f"{tmp_path}/a.parquet row "
    assert read(f"{tmp_path}/*.parquet") == [("x", "s"), ("missing_text", place + "2"), ("empty_text", place + "3")]


def test_text_columns_of_parquet(tmp_path: Path) -> None:
    texts = pa.array(["one", "two", None])
    for name, column in {"large": texts.cast(pa.large_string()), "coded": texts.dictionary_encode()}.items():
        pq.write_table(pa.table({"body": column, "n": [1, 2, 3]}), tmp_path / f"{name}.parquet")
        assert [text for text, _ in read(tmp_path / f"{name}.parquet", text_column="body")][:2] == ["one", "two"]
    with pytest.raises(ConfigError, match=r"inputs\.mine\.text_column: expected a column.*no 'text' among body, n"):
        read(tmp_path / "large.parquet")
    with pytest.raises(ConfigError, match="expected a column of strings, found 'n' of type int64"):
        read(tmp_path / "large.parquet", text_column="n")


def test_a_version_of_a_delta_table(tmp_path: Path) -> None:
    table = tmp_path / "table"
    write_deltalake(str(table), pa.table({"text": ["one"]}))
    write_deltalake(str(table), pa.table({"text": ["two"]}), mode="overwrite")
    assert read(table) == [("two", "mine")]
    assert read(table, version=0) == [("one", "mine")]
    assert (opened(table).version, opened(table, version=0).version) == (1, 0)
    assert (state_of(TextInputConfig(path=str(table))), opened(table).format) == ([1], "delta")
    with pytest.raises(ConfigError, match=r"expected a Delta table at .* at version 7, found none"):
        opened(table, version=7)


def test_what_is_no_set_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "b.txt").write_text("x")
    for path, message in (
        (tmp_path, r"expected files of one format.*b\.txt; name them with a glob"),
        (tmp_path / "lost", f"expected files of texts, found none at .*{tmp_path}/lost"),
        (tmp_path / "*.csv", "expected files of texts, found none"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(path)
    with pytest.raises(ConfigError, match=r"inputs\.mine\.version: expected a Delta table, found none"):
        opened(tmp_path / "a.jsonl", version=1)
    with pytest.raises(ConfigError, match=r"expected the field 'body'.*found \['source', 'text'\]"):
        opened(tmp_path / "a.jsonl", text_column="body")
    for name, compress in {"cut.jsonl.gz": gzip.compress, "cut.jsonl.zst": zstandard.compress}.items():
        (tmp_path / name).write_bytes(compress(lines(*map(str, range(2000))))[:-10])
        with pytest.raises(
            CorpusError, match=rf"{name} cannot be read to its end \(DamagedDataError: .* end too early"
        ):
            read(tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CorpusError, match=r"broken\.parquet cannot be read to its end"):
        read(tmp_path / "broken.parquet")


def test_the_state_changes_with_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines("one"))
    before = opened(file).state
    assert before == opened(file).state == state_of(TextInputConfig(path=str(file)))
    file.write_bytes(lines("one", "two"))
    assert opened(file).state != before
    assert state_of(TextInputConfig(path=str(tmp_path / "lost"))) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.inputs={heldout: {path: x}}", "expected another name, because heldout is the experiment's own"),
        ("evaluate.inputs={a-b: {path: x}}", "evaluation set 'a-b'"),
        ("evaluate.inputs={a: {path: ''}}", "expected a path"),
        ("evaluate.inputs={a: {path: x, format: jsonl, version: 1}}", "version of a Delta table"),
        ("evaluate.inputs={a: {path: x, text: y}}", "unknown key evaluate.inputs.a.text; did you mean 'text_column'"),
        ("evaluate.tokens_per_batch=0", "evaluate.tokens_per_batch: expected at least 1"),
    ],
)
def test_a_wrong_section_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, [override])


def test_the_names_of_the_nine_tasks() -> None:
    assert EvaluateConfig(tasks=["mine", "paper", "piqa"]).task_names == ["mine", *PAPER_TASKS]
    assert len(PAPER_TASKS) == 9
    columns = task_columns(["mine", "piqa", "hellaswag", "mine"])
    assert list(columns.items()) == [("hellaswag", "HellaSwag"), ("piqa", "PIQA"), ("mine", "mine")]
