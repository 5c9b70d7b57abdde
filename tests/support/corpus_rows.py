"""Rows of corpora and of the table `corpora`, written by delta-rs: no JVM."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from miniplm_udf import schemas
from miniplm_udf.layout import Root

MADE_AT = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)


def write(root: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema, mode: str = "append") -> None:
    """Writes rows into a table of a root."""
    place = Root(str(root)).table(name).removeprefix("file://")
    write_deltalake(Path(place).as_uri(), pa.Table.from_pylist(rows, schema=schema), mode=mode)  # type: ignore[arg-type]


def record(root: Path, name: str, version: int, **inputs: Any) -> None:
    """Records a version of a corpus."""
    row = {
        "name": name, "version": version, "config": json.dumps({"models": []}), "inputs": json.dumps(inputs),
        "threshold": 0.5, "n_candidates": 9, "candidate_tokens": 90, "n_instances": 3, "n_tokens": 30,
        "fingerprint": f"f{version}", "code_revision": "c", "created_at": MADE_AT,
    }  # fmt: skip
    write(root, "corpora", [row], schemas.CORPORA.arrow_schema())
