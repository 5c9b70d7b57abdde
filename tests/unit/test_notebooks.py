"""The notebooks as they are committed: with the outputs of the demo, and without traces of the machine that ran them.

`tests/e2e/test_notebooks.py` runs them.
"""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from docs.site.execute import LARGEST_IMAGE, LARGEST_NOTEBOOK, NOTEBOOKS, problems

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))


def cells(file: Path, kind: str) -> list[str]:
    """The sources of the cells of a kind: `code` or `markdown`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_five_notebooks() -> None:
    assert [file.name[0] for file in FILES] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_can_be_read_without_running_it(file: Path) -> None:
    assert list(problems(file)) == []
    outputs = [
        output
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    ]
    assert len(outputs) >= 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_says_what_it_reads_and_writes(file: Path) -> None:
    first = cells(file, "markdown")[0]
    assert first.startswith("# ")
    assert "reads" in first
    assert "write" in first
    assert "MINIPLM_ROOT" in first
    assert any("MINIPLM_ROOT" in source for source in cells(file, "code"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_cells_are_short(file: Path) -> None:
    assert [source for source in cells(file, "code") if source.count("\n") > 30] == []


def output(**values: Any) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": ["4 rows\n"], **values}


def png(n_bytes: int) -> dict[str, str]:
    return {"image/png": base64.b64encode(bytes(n_bytes)).decode()}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (output(text=["root /work/main/build/demo\n"]), "a path of this machine"),
        (output(text=["reads 'file:///tmp/x'\n"]), "a path of this machine"),
        (output(text=["sqlite:////home/someone/mlflow.db\n"]), "a path of this machine"),
        (output(output_type="display_data", data={"text/html": ["<td>/root/x</td>"]}), "a path of this machine"),
        (output(output_type="error", ename="ValueError", evalue="no"), "a cell ends with ValueError: no"),
        (output(name="stderr", text=["WARNING: x"]), "a message on stderr: WARNING: x"),
        (output(output_type="display_data", data=png(LARGEST_IMAGE + 1)), "an image has more than 60,000 bytes"),
        (output(text=["x" * LARGEST_NOTEBOOK]), "at most 300,000 are allowed"),
    ],
)
def test_a_notebook_that_cannot_be_published_is_refused(tmp_path: Path, wrong: dict[str, Any], problem: str) -> None:
    file = tmp_path / "x.ipynb"
    write(file, [output(), wrong])
    (message,) = problems(file)
    assert problem in message


@pytest.mark.parametrize("text", ["http://127.0.0.1:5000/#/tmp/x", "sqlite:///build/demo/mlflow.db", "and/or/tmp/x"])
def test_an_address_is_no_path_of_a_machine(tmp_path: Path, text: str) -> None:
    write(tmp_path / "x.ipynb", [output(text=[text]), output(output_type="display_data", data=png(LARGEST_IMAGE))])
    assert list(problems(tmp_path / "x.ipynb")) == []


def test_a_notebook_that_was_not_run_from_top_to_bottom_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.ipynb", [output()], execution_counts=[2, 1])
    assert list(problems(tmp_path / "x.ipynb")) == ["its cells were not run once each, from top to bottom"]
    write(tmp_path / "x.ipynb", [], execution_counts=[1])
    assert list(problems(tmp_path / "x.ipynb")) == ["it has no outputs"]


def write(file: Path, outputs: list[dict[str, Any]], execution_counts: tuple[int, ...] | list[int] = (1,)) -> None:
    """A notebook whose cells all have the same outputs."""
    code = [
        {"cell_type": "code", "source": ["x\n"], "execution_count": count, "outputs": outputs}
        for count in execution_counts
    ]
    file.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# X\n"]}, *code]}))
