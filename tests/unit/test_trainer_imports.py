"""The imports of the trainer's files, from their source: no Spark anywhere, only torch and numpy in the maths."""

import ast
import sys
from pathlib import Path

import pytest

import trainer

FOLDER = Path(trainer.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
MATHS = (
    "loop", "schedule", "losses/loss", "losses/lm_loss", "losses/chunked_head", "losses/kd_loss", "losses/kd_teacher",
    "models/blocks", "models/precision", "models/flops", "models/model", "loader/order", "loader/batches",
    "loader/row_cache", "ranks/distributed",
)  # fmt: skip


def imported(file: Path, module_level_only: bool) -> set[str]:
    """Dotted names of imported modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            whole = node.module not in ("miniplm_udf", "miniplm_udf.store", "miniplm_udf.ingestion")
            names |= {str(node.module) if whole else f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_library_parts(file: Path) -> None:
    allowed = {"errors", "schemas", "config", "layout", "storage", "progress", "scoring", "store", "lease", "stopping"}
    allowed |= {"revision", "json_records", "object_storage", "failures", "storage_errors"}
    names = imported(file, module_level_only=False)
    parts = [name.split(".") for name in names if name.startswith("miniplm_udf.")]
    assert {part[1] for part in parts} <= allowed | {"ingestion", "packing", "workers"}
    assert {part[2] for part in parts if part[1] == "ingestion"} <= {"text_sets", "documents", "chunking"}
    # Parts of rooms whose other modules need Spark or a scorer.
    parts_of_rooms = {".".join(part[1:3]) for part in parts if part[1] in ("packing", "workers")}
    assert parts_of_rooms <= {"packing.file_layout", "workers.read_ahead"}
    parts_of_store = {".".join(part[1:3]) for part in parts if part[1] == "store"}
    assert parts_of_store <= {"store.delta_files", "store.delta_log", "store.model_records", "store.provenance"}
    assert not {"pyspark", "delta", "jobs"} & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_runs_on_a_bare_gpu_box(name: str) -> None:
    roots = {found.split(".")[0] for found in imported(FOLDER / f"{name}.py", module_level_only=True)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers", "numpy", "trainer", "miniplm_udf"}
