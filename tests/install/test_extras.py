"""The built distributions, each extra alone in an environment of its own, in a folder outside the clone."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support import tiny_models, trainer_roots
from tests.support.environments import REPOSITORY, build, environment
from tests.support.right_experiment import Place

pytestmark = pytest.mark.long
SCORE = """
import json, sys
import pyarrow as pa
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scores.models import describe_here
from miniplm_udf.scores.nll import nll_arrow
from miniplm_udf.workers.model_scorers import ModelScorerFactory

if __name__ == "__main__":
    model = ModelConfig(path=sys.argv[1], context_tokens=64, window_overlap_tokens=16)
    factory = ModelScorerFactory(model, describe_here("nll", model, None), ScoreConfig())
    for scores in nll_arrow(factory, True)(iter([pa.array(["the river walks", "tea and stone"])])):
        print(json.dumps(scores.to_pylist()))
"""


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    return build(tmp_path_factory.mktemp("dist"))


def has(name: str) -> str:
    """A program that fails unless a module is missing."""
    return f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"


@pytest.mark.parametrize(("number", "python"), [(0, "3.11"), (1, "3.11"), (1, "3.12"), (1, "3.13")])
def test_the_base_install(distributions: tuple[Path, Path], number: int, python: str, tmp_path: Path) -> None:
    if subprocess.run(["uv", "python", "find", "--no-python-downloads", python], capture_output=True).returncode:
        pytest.skip(f"Python {python} is not installed")
    with environment(tmp_path / "base", distributions[number], python=python) as base:
        place = tmp_path / "place"
        place.mkdir()
        config = str(Place(place).file())
        base.output("python", "-c", has("numpy"))
        assert "usage: miniplm COMMAND" in base.output("miniplm", "--help")
        assert f"python             {python}" in base.output("miniplm", "doctor")
        assert "_shtab_miniplm" in base.output("miniplm", "completion", "bash")
        assert "plan:" in base.output("miniplm", "run", "--dry-run", "-c", config)
        assert "missing" in base.run("miniplm", "ingest", "-c", config).stderr
        # Files of the package: rules, students, the page of the report, the jar.
        assert set(json.loads(base.output("miniplm", "refine", "--rules", "--json"))) >= {"miniplm", "random"}
        folder = Path(base.output("python", "-c", "import miniplm_udf; print(miniplm_udf.__path__[0])").strip())
        kept = ("config/*/*.yaml", "report/*.j2", "s3_commits/*.jar", "streams/*.properties")
        here = REPOSITORY / "miniplm_udf"
        for pattern in kept:
            names = {str(file.relative_to(here)) for file in here.glob(pattern)}
            assert names
            assert {str(file.relative_to(folder)) for file in folder.glob(pattern)} == names


def test_the_scorer_alone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny_models.make_model_folder(tmp_path, "llama")
    with environment(tmp_path / "score", distributions[1], "score") as score:
        score.output("python", "-c", has("pyspark"))
        (score.home / "score.py").write_text(SCORE)
        rows = json.loads(score.output("python", "score.py", str(model)))
    scorer = tiny_models.make_scorer(model)
    here = scorer.score(["the river walks", "tea and stone"], [[], []], [True, True])
    assert len(rows) == 2
    for row, result in zip(rows, here, strict=True):
        assert (row["n_tokens"], row["n_bytes"]) == (result.n_tokens, result.n_bytes)
        assert row["nll_sum_nats"] == pytest.approx(result.nll_sum_nats, rel=1e-4)


def test_the_trainer_alone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    trainer_roots.make_root(place)
    config = next(place.glob("*.yaml"))
    with environment(tmp_path / "train", distributions[1], "train") as train:
        train.output("python", "-c", has("pyspark"))
        for command in ("train", "evaluate", "scaling"):
            assert "usage: python -m trainer" in train.output("python", "-m", "trainer", command, "--help")
        train.output("python", "-m", "trainer", "train", "-c", str(config), "--dry-run")
        trained = json.loads(train.output("python", "-m", "trainer", "train", "-c", str(config)))
        assert trained


def test_the_driver_alone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config = str(Place(place).file())
    with environment(tmp_path / "spark", distributions[1], "spark") as spark:
        spark.output("python", "-c", has("torch"))
        assert "missing" not in [
            line.split()[0] for line in spark.output("miniplm", "doctor").splitlines() if "extra spark" in line
        ]
        ended = spark.run("miniplm", "ingest", "-c", config)
        assert ended.returncode == 1
        assert "the package tokenizers is not installed for the Python of an executor" in ended.stderr
