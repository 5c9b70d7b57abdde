"""Every table that `schemas` declares stands in each list of tables, or is an exception here, with its reason.

A table that maintenance does not list is never merged or vacuumed, and one that the take-down does not list keeps texts
that were taken down: nothing else would tell.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora import takedown
from miniplm_udf.lease import Lease
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.types import Table
from miniplm_udf.store import catalog, tables
from miniplm_udf.upkeep import checks, maintain, preflight

# Arguments of the functions that declare a table.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "annotations": (["language"],),
    "cuts": ("best",),
    "packed": ("best", "bpe"),
    "refined": ("best", ["teacher"]),
    "refined_as": ("best", {"models": ["teacher"]}),
    "score_matrix": (["teacher"],),
}
FOLDERS = {table_names.REFINED, table_names.CUTS, table_names.PINNED, table_names.PACKED}
NOT_REGISTERED = {
    "document_keys": "hashes alone, for the next ingest",
    "cuts": "numbers of a query that runs",
    "pinned": "`read_corpus` reads the copy of a pinned version",
    "packed": "token ids in binary, which the trainer reads",
}
NEVER_NAMED = {
    "pins": "no checkpoint and no record names it",
    "takedowns": "no checkpoint and no record names it",
    "cuts": "a follower counts again",
    "packed": "`miniplm pack` makes it again",
}
NOT_BY_INSTANCE = {
    "document_keys": "hashes alone, which keep a document from being packed again",
    "corpora": "no ids and no texts",
    "pins": "no ids and no texts; its counts are changed with the copy",
    "takedowns": "the record of the take-down itself",
    "cuts": "removed whole",
    "refined": "gets a new version",
    "pinned": "changed with its row of `pins`",
    "packed": "emptied, as its sequences have no ids",
}
NOT_READ_BY_ALL_CHECKS = {
    "document_keys": "read by the check of the ingest",
    "pins": "read by the check of pinned copies",
    "takedowns": "read by the check of take-downs",
    "cuts": "numbers of a query that runs",
    "refined": "read by the check of corpora",
    "pinned": "read by the check of pinned copies",
    "packed": "read by the check of take-downs, by time",
}


def declared() -> dict[str, Table]:
    """Every table of `schemas` by kind, from its constants and from the functions that declare a table."""
    functions = inspect.getmembers(schemas, inspect.isfunction)
    makers = {name: make for name, make in functions if inspect.signature(make).return_annotation is Table}
    assert set(makers) == set(ARGUMENTS), "give the arguments of a new function"
    made = [make(*ARGUMENTS[name]) for name, make in makers.items()]
    constants = [value for value in vars(schemas).values() if isinstance(value, Table)]
    return {table_names.kind_of(table.name): table for table in [*constants, *made]}


def kinds() -> set[str]:
    """Every kind of table; a pinned version has the declaration of its corpus."""
    return {*declared(), *FOLDERS}


@pytest.mark.parametrize(
    ("listed", "exceptions"),
    [
        ((*catalog._NAMES, table_names.REFINED), NOT_REGISTERED),
        (preflight._REMEDIES, NEVER_NAMED),
        (takedown._BY_INSTANCE, NOT_BY_INSTANCE),
        (checks.TABLES, NOT_READ_BY_ALL_CHECKS),
    ],
    ids=["catalog", "preflight", "take-down", "verify"],
)
def test_a_table_stands_in_each_list_or_is_an_exception(listed: Iterable[str], exceptions: dict[str, str]) -> None:
    assert sorted([*listed, *exceptions]) == sorted(kinds())


def test_maintenance_lists_every_table_but_pinned_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("refined/best", "cuts/best", "pinned/best/1", "packed/best/bpe"):
        (tmp_path / "tables" / name).mkdir(parents=True)
    monkeypatch.setattr(tables, "exists", lambda spark, uri: True)
    config = ExperimentConfig(root=str(tmp_path))
    names = list(maintain._table_names(None, config))  # type: ignore[arg-type]
    assert sorted(map(table_names.kind_of, names)) == sorted(kinds() - {table_names.PINNED})


def test_each_merged_table_has_writers(tmp_path: Path) -> None:
    for name in (*maintain._MERGED, table_names.refined("best")):
        assert all(isinstance(lease, Lease) for lease in maintain._writers(str(tmp_path), name, []))


def test_a_lost_table_has_a_remedy_and_every_needed_table_is_known() -> None:
    written = {name for names in preflight._WRITES.values() for name in names}
    assert written <= set(preflight._REMEDIES)
    assert {name for names in preflight._NEEDS.values() for name in names} <= kinds()
    for kind in preflight._REMEDIES:
        assert preflight._REMEDIES[kind] in str(preflight.LostTable(f"{kind}/best", "the checkpoint"))


def test_tables_by_instance_have_its_id() -> None:
    assert all("instance_id" in declared()[name].column_names for name in takedown._BY_INSTANCE)
