"""Places under a root: each way from a name to a URI, and back where there is one."""

from pathlib import Path

import pytest

from miniplm_udf.layout import Root, is_tokenizer_folder, shown_table
from miniplm_udf.schemas import table_names

ROOTS = ["/data/root", "/data/root/", "s3://bucket/root"]
NAMES = {
    "scores": ("scores", None),
    table_names.refined("best"): ("refined", "best"),
    table_names.cuts("best"): ("cuts", "best"),
    table_names.pinned("best", 3): ("pinned", "best"),
    table_names.packed("best", "bpe"): ("packed", "best"),
}


@pytest.mark.parametrize("uri", ROOTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_found_again_by_its_uri(uri: str, name: str) -> None:
    root = Root(uri)
    assert root.table_name(root.table(name)) == name
    assert root.relative(root.table(name)) == shown_table(name) == f"tables/{name}"
    assert (table_names.kind_of(name), table_names.corpus_of(name)) == NAMES[name]


@pytest.mark.parametrize("uri", ROOTS)
def test_what_is_no_table(uri: str) -> None:
    root = Root(uri)
    assert root.table_name(root.exports("best-3")) is None
    assert root.table_name(root.table()) is None
    assert root.relative(root.exports("best-3")) == "exports/best-3"
    assert root.relative("s3://other/root/tables/scores") == "s3://other/root/tables/scores"


def test_places_have_the_names_of_their_tables(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert root.refined("best") == root.table(table_names.refined("best"))
    assert root.cuts("best") == root.table(table_names.cuts("best"))
    assert root.pinned("best", 3) == root.table(table_names.pinned("best", 3))
    assert root.packed("best", "bpe") == root.table(table_names.packed("best", "bpe"))


def test_tokenizers_and_trainings(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert root.relative(root.tokenizer("bpe", "miniplm.json")) == "models/tokenizer_bpe/miniplm.json"
    assert is_tokenizer_folder("tokenizer_bpe")
    assert not is_tokenizer_folder("bpe")
    assert root.relative(root.training("small")) == "_checkpoints/train/small"
