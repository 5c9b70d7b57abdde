"""Finished students as registered models: loadable by `mlflow.transformers`, sent once, not lost with a store."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.stage_inputs import trained_files
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.errors import ConfigError
from tests.support.killed_training import train_small
from tests.support.trainer_roots import make_root, write_config
from trainer.__main__ import main
from trainer.results import registry
from trainer.tracking.store import connect

REGISTERED = "mlflow.registered_model=demo {student}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished student that is not registered."""
    folder = tmp_path_factory.mktemp("trained")
    make_root(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        train_small(load_config(write_config(folder, folder / "root")))
    return folder


@pytest.fixture
def path(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return write_config(tmp_path, tmp_path / "root")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise OSError(f"no network in this test: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def recorded(path: Path) -> dict[str, Any]:
    return dict(json.loads((path.parent / "root" / "models" / "small" / "registration.json").read_text()))


def versions(config: ExperimentConfig, name: str) -> list[Any]:
    return list(connect(config).MlflowClient().search_model_versions(f"name = '{name}'"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_a_finished_student_is_loaded_by_mlflow(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-c", str(path), "--student", "small", REGISTERED]) == 0
    result = json.loads(capsys.readouterr().out)["small"]
    assert (result["skipped"], result["registered"]) == (True, recorded(path))
    config = load_config(path, [REGISTERED])
    mlflow = connect(config)
    (version,) = versions(config, "demo small")
    assert (str(version.version), version.run_id) == ("1", result["run_id"])
    facts = {"packed_version": "0", "refined_version": "3", "corpus": "kept", "manifest_hash": result["manifest_hash"]}
    assert facts.items() <= version.tags.items()
    model = mlflow.models.get_model_info("models:/demo small/1")
    assert facts.items() <= model.metadata.items()
    assert [column.type.name for column in model.signature.inputs] == ["string"]
    pipeline = mlflow.transformers.load_model("models:/demo small/1")
    weights = load_file(path.parent / "root" / "models" / "small" / "model.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in pipeline.model.state_dict().items() if name in weights
    )
    assert pipeline.tokenizer("the river")["input_ids"]
    assert pipeline("the river", max_new_tokens=2)[0]["generated_text"].startswith("the river")
    requirements = Path(mlflow.pyfunc.get_model_dependencies("models:/demo small/1")).read_text()
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements


@pytest.mark.slow
def test_the_weights_are_sent_once_for_each_training(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = registry._log_model

    def count(mlflow: Any, config: ExperimentConfig, training: Any) -> str:
        sent.append(training.name)
        return original(mlflow, config, training)

    monkeypatch.setattr(registry, "_log_model", count)
    config = load_config(path, [REGISTERED])
    first = registry.register(config, ["small", "not_trained"])
    assert list(first) == ["small"]
    assert registry.register(config, ["small"]) == first
    # Under another name, the model that MLflow has is registered.
    renamed = load_config(path, ["mlflow.registered_model=all"])
    assert registry.register(renamed, ["small"])["small"].model_id == first["small"].model_id
    assert sent == ["small"]
    train_small(config, retrain=True)
    assert registry.register(config, ["small"])["small"].version == "2"
    assert len(sent) == 2
    assert [str(version.version) for version in versions(config, "all")] == ["1"]
    # A model that is no longer in the store is sent again.
    connect(config).MlflowClient().delete_logged_model(recorded(path)["model_id"])
    assert registry.register(renamed, ["small"])["small"].version == "2"
    assert len(sent) == 3
    # Another store has neither the model nor its versions.
    moved = load_config(path, [REGISTERED, f"mlflow.tracking_uri=sqlite:///{path.parent}/moved.db"])
    assert registry.register(moved, ["small"])["small"].version == "1"
    assert len(sent) == 4


@pytest.mark.slow
def test_a_store_that_is_away_delays_the_registration(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow
    from requests.exceptions import ConnectionError

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    config = load_config(path, [REGISTERED])
    # First MLflow cannot be reached at all, then only the registry: the weights are sent once.
    with monkeypatch.context() as patch:
        patch.setattr(registry, "connect", away)
        assert registry.register(config, ["small"]) == {}
    assert "small: MLflow does not register the model: connection refused; the next `miniplm train`" in caplog.text
    record = path.parent / "root" / "models" / "small" / "registration.json"
    assert trained_files(config) == [
        config.layout.model("small", "training.json"),
        config.layout.model("small", "registration.json"),
    ]
    assert not record.exists()
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "register_model", away)
        assert registry.register(config, ["small"]) == {}
    model_id = recorded(path)["model_id"]
    assert recorded(path)["version"] is None
    registration = registry.register(config, ["small"])["small"]
    assert (registration.model_id, registration.version) == (model_id, "1")


@pytest.mark.slow
def test_an_error_of_ours_is_not_taken_for_mlflows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a fault in our code")

    monkeypatch.setattr(registry, "_register", broken)
    with pytest.raises(KeyError, match="a fault in our code"):
        registry.register(load_config(path, [REGISTERED]), ["small"])


@pytest.mark.slow
def test_nothing_is_registered_unless_it_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_register", None)
    config = load_config(path)
    assert registry.register(config, ["small"]) == {}
    assert trained_files(config) == [config.layout.model("small", "training.json")]


@pytest.mark.parametrize("name", ["a/b", "a:b", "{model}"])
def test_a_name_that_mlflow_refuses_is_refused_first(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"mlflow\.registered_model"):
        load_config(path, [f"mlflow.registered_model={name}"])
