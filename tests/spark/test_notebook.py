"""The notebook runs from top to bottom, in a kernel and a JVM of its own, on a small real experiment."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import storage
from tests.support import report_root
from tests.support.report_root import REPOSITORY, Built
from tests.support.tiny_models import make_model_folder

NOTEBOOK = REPOSITORY / "notebooks/explore.ipynb"


@pytest.fixture(scope="module")
def built(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        built = report_root.build_root(spark, tmp_path_factory.getbasetemp() / "an experiment, zwölf")
        patch.setenv("MINIPLM_ROOT", built.config.root)
        # The only model that is there in full; the students are records.
        make_model_folder(Path(storage.local_path(built.config.layout.model(""))), name="reference")
        # A kernel is started with this process's environment, and the JVM of this process is not its own.
        for name in ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET"):
            patch.delenv(name, raising=False)
        yield built


def _run(folder: Path) -> list[str]:
    """Executes the notebook in `folder`; what each code cell printed or showed, as text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with contextlib.chdir(folder):
        client.execute()
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts.append(output.get("text", "") + data.get("text/plain", "") + ("<png>" if "image/png" in data else ""))
    return texts


def test_notebook_is_committed_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.long
def test_notebook_runs_and_shows_what_is_in_the_tables(built: Built) -> None:
    shown = "\n".join(_run(NOTEBOOK.parent))
    ranked = len(built.candidates)
    before, after = int(ranked * 0.3), ranked // 2
    assert "version 1, 320 rows; Spark counts 320" in shown
    assert f"difference: version 1 -> 2, {after - before} rows added, 0 removed" in shown
    assert re.search(rf'"n_instances": {after}\b', shown), "no provenance of the newest version"
    assert "OVERWRITE" in shown.upper() or "WRITE" in shown
    for name, bits in (("miniplm", "2.1034"), ("conventional", "2.1271")):
        assert re.search(rf"{name}.*{bits}", shown, flags=re.DOTALL)
    assert "<png>" in shown
    n_heldout = sum(row["split"] == "heldout" for row in built.instances)
    by_nll = shown.partition("nll_nats_per_byte")[2].partition("version 1, 320 rows")[0]
    assert sum(map(int, re.findall(r"\|\s*(\d+)\|\d\.\d+", by_nll))) == n_heldout
    for source in report_root.SOURCES:
        n_rows = sum(row["source"] == source for row in built.matrix)
        assert re.search(rf"{re.escape(source)}\s+{n_rows}\b", shown), source
