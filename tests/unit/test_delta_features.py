"""Tables that cannot be read from their files are refused by name; other tables are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.store.delta_features import FILE_READER_PROPERTIES, needs_repair, refuse_unreadable_features
from miniplm_udf.store.delta_files import parquet_files
from trainer.loader.data import open_delta

# Rows 3, 4, 7, 11, 18 and 29 of a file: the example of Delta's protocol.
VECTOR = {
    "storageType": "i", "pathOrInlineDv": "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L", "sizeInBytes": 40,
    "cardinality": 6,
}  # fmt: skip


def commit(folder: Path, features: list[str], *actions: dict[str, Any]) -> None:
    """Adds version 1, as another writer could have."""
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
    lines = [{"protocol": protocol}, *actions]
    log = folder / "_delta_log" / f"{1:020}.json"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def first_commit(folder: Path, action: str) -> dict[str, Any]:
    lines = (folder / "_delta_log" / f"{0:020}.json").read_text().splitlines()
    return next(found[action] for found in map(json.loads, lines) if action in found)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_deltalake(str(tmp_path), pa.table({"number": np.arange(40)}))
    return tmp_path


def test_a_plain_table_passes(table: Path) -> None:
    refuse_unreadable_features(DeltaTable(str(table)), "here")
    # The feature alone hides no row: so is a table after its repair.
    commit(table, ["deletionVectors"])
    assert open_delta(storage.to_uri(str(table)), None, "pack").version() == 1


def test_deletion_vectors_are_refused_where_there_are_any(table: Path) -> None:
    add = first_commit(table, "add")
    remove = {"path": add["path"], "deletionTimestamp": 0, "dataChange": True}
    commit(table, ["deletionVectors"], {"remove": remove}, {"add": {**add, "deletionVector": VECTOR}})
    with pytest.raises(CorpusError, match=f"{table}: .*deletion vectors.*miniplm maintain"):
        open_delta(storage.to_uri(str(table)), None, "pack")
    with pytest.raises(CorpusError, match=f"{table}: .*deletion vectors"):  # the list of files, as in the README
        parquet_files(str(table))
    open_delta(storage.to_uri(str(table)), 0, "pack")
    assert len(parquet_files(str(table), 0)) == 1


def test_mapped_and_widened_columns_are_refused(table: Path) -> None:
    metadata = first_commit(table, "metaData")
    schema = json.loads(metadata["schemaString"])
    field = schema["fields"][0]
    field["metadata"] = {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "col-1"}
    mapped = {"schemaString": json.dumps(schema), "configuration": {"delta.columnMapping.mode": "name"}}
    commit(table, ["columnMapping"], {"metaData": {**metadata, **mapped}})
    with pytest.raises(CorpusError, match=r"column mapping \(name\)"):
        open_delta(storage.to_uri(str(table)), None, "pack")
    field["metadata"] = {"delta.typeChanges": [{"fromType": "integer", "toType": "long"}]}
    commit(table, ["typeWidening"], {"metaData": {**metadata, "schemaString": json.dumps(schema)}})
    with pytest.raises(CorpusError, match=r"type widening.*DROP FEATURE"):
        open_delta(storage.to_uri(str(table)), None, "pack")


def test_what_has_to_be_rewritten() -> None:
    assert not needs_repair(["appendOnly", "invariants"], {})
    assert not needs_repair(["appendOnly"], FILE_READER_PROPERTIES)
    assert needs_repair(["deletionVectors"], FILE_READER_PROPERTIES)
    assert needs_repair([], {"delta.columnMapping.mode": "name"})
    # Switched off, and the files are still of both types.
    assert needs_repair(["typeWidening"], FILE_READER_PROPERTIES)
