"""What the trainer's files may import, from their source: no Spark anywhere, torch and numpy alone in the maths."""

import ast
import sys
from pathlib import Path

import pytest

import trainer

FILES = sorted(Path(trainer.__file__).parent.glob("*.py"))
MATHS = ("loop", "loss", "schedule", "order", "model", "distributed")


def imported(file: Path, module_level_only: bool) -> set[str]:
    """Dotted names of imported modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            whole = node.module != "miniplm_udf"
            names |= {str(node.module) if whole else f"miniplm_udf.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_library_parts(file: Path) -> None:
    allowed = {"errors", "schemas", "config", "storage", "progress", "scoring"}
    names = imported(file, module_level_only=False)
    assert {name.split(".")[1] for name in names if name.startswith("miniplm_udf.")} <= allowed
    assert not {"pyspark", "delta", "jobs"} & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_runs_on_a_bare_gpu_box(name: str) -> None:
    roots = {found.split(".")[0] for found in imported(FILES[0].parent / f"{name}.py", module_level_only=True)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers", "numpy", "trainer", "miniplm_udf"}
