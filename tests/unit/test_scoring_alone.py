"""The scorer where only torch and transformers are installed: no Spark, no Arrow, no config library, no site-packages.

A folder of links to what pip would install with these two, by their own metadata, stands in for that machine; the
interpreter sees it, the standard library and this repository's packages, and nothing else.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.tiny_models import make_scorer
from tests.support.without_packages import installed_with

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, json, sys
from tests.support.scoring_oracles import ROWS
from tests.support.tiny_models import make_scorer
scorer = make_scorer(sys.argv[1])
found = scorer.score([row[0] for row in ROWS], [row[1] for row in ROWS], [row[2] for row in ROWS])
absent = [name for name in ("pyspark", "pyarrow", "pandas", "jsonargparse", "pytest", "mlflow", "deltalake", "gguf")
          if importlib.util.find_spec(name) is None]
scores = [one for one in found if hasattr(one, "n_tokens")]
print(json.dumps([absent, [[one.nll_sum_nats, one.n_tokens, one.n_bytes] for one in scores]]))
"""


def link_distributions(names: set[str], folder: Path) -> None:
    for name in names:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))


@pytest.mark.slow
def test_it_scores_with_torch_and_transformers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = installed_with("torch", "transformers")
    assert {"torch", "transformers", "numpy", "tokenizers"} <= names
    assert not {"pyarrow", "pandas", "pyspark", "pytest", "jsonargparse"} & names
    site = tmp_path / "site"
    site.mkdir()
    link_distributions(names, site)
    for package in ("miniplm_udf", "tests"):
        (site / package).symlink_to(REPOSITORY / package)
    folder = tiny_models.make_model_folder(tmp_path, "qwen2")
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(folder)],
        env={"PYTHONPATH": str(site), "MINIPLM_CACHE": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    absent, numbers = json.loads(done.stdout.splitlines()[-1])
    assert absent == ["pyspark", "pyarrow", "pandas", "jsonargparse", "pytest", "mlflow", "deltalake", "gguf"]
    from tests.support.scoring_oracles import ROWS

    scorer = make_scorer(folder)
    here = scorer.score([row[0] for row in ROWS], [row[1] for row in ROWS], [row[2] for row in ROWS])
    expected = [[one.nll_sum_nats, one.n_tokens, one.n_bytes] for one in here if hasattr(one, "n_tokens")]
    assert len(numbers) == len(expected) > 5
    for one, other in zip(numbers, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5 * one[1])
        assert one[1:] == other[1:]
