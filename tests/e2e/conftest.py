"""A user's own files through the whole pipeline, once for all tests here: `miniplm run` as a process, elsewhere."""

import pytest

from tests.support.spark_session import spark as spark
from tests.support.tiny_models import make_model_folder
from tests.support.user_corpus import Experiment, make_documents, write_jsonl


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A pipeline that has run once over two files."""
    home = tmp_path_factory.mktemp("user home")
    teacher = make_model_folder(home / "teacher", "llama")
    made = Experiment(home=home, root=home / "root", texts=home / "texts", teacher=teacher)
    write_jsonl(made.texts / "a.jsonl", make_documents(60, seed=1))
    write_jsonl(made.texts / "b.jsonl", make_documents(60, seed=2))
    done = made.miniplm("run")
    assert done.returncode == 0, done.stderr[-6000:]
    return made
