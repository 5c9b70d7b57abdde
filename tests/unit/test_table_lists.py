"""Every table that `schemas` declares has its kind in `table_kinds.KINDS`, and the kinds agree with the columns.

A table that maintenance does not know is never merged or vacuumed, and one that the take-down does not know keeps texts
that were taken down: nothing else would tell.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest

from jobs.stages import SERVICES, STAGES
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.lease import Lease
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.table_kinds import EFFECT_OF_REMOVAL, KINDS
from miniplm_udf.schemas.types import Table
from miniplm_udf.store import tables
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


def declared() -> dict[str, Table]:
    """Every table of `schemas` by kind, from its constants and from the functions that declare a table."""
    functions = inspect.getmembers(schemas, inspect.isfunction)
    makers = {name: make for name, make in functions if inspect.signature(make).return_annotation is Table}
    assert set(makers) == set(ARGUMENTS), "give the arguments of a new function"
    made = [make(*ARGUMENTS[name]) for name, make in makers.items()]
    constants = [value for value in vars(schemas).values() if isinstance(value, Table)]
    return {table_names.kind_of(table.name): table for table in [*constants, *made]}


def names() -> list[str]:
    return [kind.name for kind in KINDS]


def test_every_declared_table_has_a_kind() -> None:
    """A pinned version has the declaration of its corpus."""
    assert sorted(names()) == sorted({*declared(), *table_names.FOLDERS})


def test_maintenance_lists_every_table_but_pinned_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("refined/best", "cuts/best", "pinned/best/1", "packed/best/bpe"):
        (tmp_path / "tables" / name).mkdir(parents=True)
    monkeypatch.setattr(tables, "exists", lambda spark, uri: True)
    config = ExperimentConfig(root=str(tmp_path))
    listed = list(maintain._table_names(None, config))  # type: ignore[arg-type]
    assert sorted(map(table_names.kind_of, listed)) == sorted({*names()} - {table_names.PINNED})


def test_each_merged_table_has_writers(tmp_path: Path) -> None:
    for kind in KINDS:
        if kind.is_merged:
            name = table_names.refined("best") if kind.name == table_names.REFINED else kind.name
            assert kind.leases or kind.queries or kind.name == table_names.REFINED
            assert all(isinstance(lease, Lease) for lease in maintain._writers(str(tmp_path), name, []))


def test_a_lost_table_has_a_remedy_and_every_needed_table_is_known() -> None:
    for kind in KINDS:
        assert kind.remedy or not kind.queries, "a checkpoint names it, so its loss is noticed"
        assert kind.remedy in str(preflight.LostTable(f"{kind.name}/best", "the checkpoint"))
    needed = {name for stage in (*STAGES, *SERVICES) for name in stage.needed_tables}
    assert needed <= set(preflight.EVERY_TABLE)
    queries = {query for stage in (*STAGES, *SERVICES) for query in stage.queries}
    assert queries == set(EFFECT_OF_REMOVAL) == {query for kind in KINDS for query in kind.queries}


def test_rows_of_instances_have_their_id_and_are_verified() -> None:
    """Other tables with that column keep their rows, or a take-down changes them in another way."""
    with_instances = {kind.name for kind in KINDS if kind.has_instances}
    with_column = {name for name, table in declared().items() if "instance_id" in table.column_names}
    assert with_column == with_instances | {"document_keys", table_names.REFINED}
    assert all(kind.is_verified for kind in KINDS if kind.has_instances)
    assert not any(kind.is_verified for kind in KINDS if kind.is_folder)


def test_a_table_with_micro_batches_names_the_queries_that_write_it() -> None:
    for kind in KINDS:
        if not kind.is_folder:
            has_batches = "batch_id" in declared()[kind.name].column_names
            assert bool(kind.queries) == has_batches, kind.name


def test_a_table_is_read_before_the_tables_that_it_is_made_from() -> None:
    """A row that is written while `verify` reads is then never missing from the table that it was made from."""
    assert checks.TABLES.index("score_matrix") < checks.TABLES.index("scores") < checks.TABLES.index("instances")
    assert checks.TABLES[0] == "corpora"
    assert checks.TABLES[-1] == "instances"


def test_versioned_tables_are_those_whose_files_delta_keeps() -> None:
    pinnable = {name for name, table in declared().items() if table.pinnable}
    assert {kind.name for kind in KINDS if kind.is_versioned} == pinnable
