"""Training as a command does it: what is written, what is left alone, what a kill costs, what MLflow holds."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from miniplm_udf import lease, storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.sections import SplitConfig
from miniplm_udf.config.targets import reference_target, student_target
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from miniplm_udf.store.model_records import TrainedText, read_training
from tests.support.full_disk import largest_file
from tests.support.killed_training import Killed
from tests.support.s3_server import BUCKET, S3Server
from tests.support.trainer_roots import (
    FAMILIES,
    make_root,
    pack,
    packed_metadata,
    some_texts,
    write_config,
    write_packed,
    write_tokenizer,
)
from trainer.__main__ import main
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.loader.order import ORDER_VERSION
from trainer.records import TrainResult
from trainer.results import model_folder
from trainer.tracking.store import connect
from trainer.train import train


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root to be copied."""
    folder = tmp_path_factory.mktemp("fresh")
    make_root(folder)
    return folder


@pytest.fixture
def config(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    return load_config(write_config(tmp_path, tmp_path / "root"))


def folder(config: ExperimentConfig, name: str) -> Path:
    return Path(storage.local_path(config.layout.model(name)))


def student(config: ExperimentConfig, **options: Any) -> dict[str, Any]:
    return train(config, student_target(config, "small"), **options).as_json()


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_model_says_where_its_text_came_from(config: ExperimentConfig) -> None:
    inputs = ["/texts/a.jsonl", "s3a://key:secret@bucket/b"]
    ingest = dataclasses.replace(config.ingest, input=inputs, split=SplitConfig(reference=0.2))
    trained = dataclasses.replace(config, ingest=ingest)
    train(trained, student_target(trained, "small"))
    record = read_training(trained, "small")
    assert record is not None
    assert record.text == TrainedText(inputs=["file:///texts/a.jsonl", "s3a://bucket/b"], reference_share=0.2)


def test_a_model_folder_is_whole(config: ExperimentConfig) -> None:
    training = student(config)
    found = folder(config, "small")
    names = {path.name for path in found.iterdir()} - {"generation_config.json"}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    tokenizer = folder(config, "tokenizer_bpe")
    assert (found / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    architecture = json.loads((found / "config.json").read_text())
    assert (architecture["use_cache"], architecture["max_position_embeddings"]) == (True, 16)
    written = json.loads((found / "training.json").read_text())
    assert training == {**written, "skipped": False}
    assert train(config, student_target(config, "small")) == TrainResult("small", read_training(config, "small"), True)
    assert (written["steps"], written["sequences"], written["tokens"]) == (6, 24, 24 * 16)
    assert written["packed_version"] == 0
    assert written["lineage"]["refined_version"] == 3
    assert written["final_loss"] > 0
    assert not list(found.parent.glob(".*"))


@pytest.mark.slow
def test_a_finished_model_is_left_and_another_config_or_table_is_not(
    config: ExperimentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = student(config)
    before = (folder(config, "small") / "model.safetensors").stat().st_mtime_ns
    assert student(config) == {**first, "skipped": True}
    watched = load_config(write_config(tmp_path, tmp_path / "root", log_every_steps=3, micro_batch_sequences=1))
    assert student(watched)["skipped"]
    assert (folder(config, "small") / "model.safetensors").stat().st_mtime_ns == before
    other = load_config(write_config(tmp_path, tmp_path / "root", seed=1))
    assert "trained again" not in caplog.text
    assert not student(other)["skipped"]
    assert "small is trained with other settings (6 steps): it is trained again, and the new model" in caplog.text
    table = Path(storage.local_path(config.layout.table("packed/kept/bpe")))
    tokenizer = write_tokenizer(tmp_path / "same")
    write_packed(table, *pack(tokenizer, some_texts(15)), packed_metadata(folder(config, "tokenizer_bpe")))
    again = student(other)
    assert (again["skipped"], again["packed_version"]) == (False, 1)
    assert "small is trained with other data, or another tokenizer or teacher (6 steps)" in caplog.text
    assert student(other, retrain=True)["skipped"] is False


@pytest.mark.slow
def test_another_order_of_the_rows_continues_no_checkpoint(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = student(config)
    monkeypatch.setattr("trainer.preparation.ORDER_VERSION", ORDER_VERSION - 1)
    again = student(config)
    assert not again["skipped"]
    assert again["fingerprint"] != first["fingerprint"]


@pytest.mark.slow
def test_a_mamba_student_trains_with_a_parallel_scan_or_not_at_all(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mamba = load_config(write_config(tmp_path, tmp_path / "root"), [f"students.small.architecture={FAMILIES['mamba']}"])
    with monkeypatch.context() as patch:
        patch.setattr("trainer.models.model._is_installed", lambda package: False)
        with pytest.raises(ConfigError, match=r"^students\.small\.architecture: expected a parallel scan"):
            student(mamba)
    pytest.importorskip("mambapy", reason="the extra train has mambapy")
    assert student(mamba)["final_loss"] > 0
    # A model that is loaded again, to be evaluated for example, has the same scan.
    assert json.loads((folder(mamba, "small") / "config.json").read_text())["use_mambapy"] is True


@pytest.mark.slow
def test_the_reference_is_frozen(config: ExperimentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(config, reference_target(config))
    assert json.loads((folder(config, "reference") / "config.json").read_text())["max_position_embeddings"] == 32
    changed = load_config(write_config(tmp_path, tmp_path / "root", seed=5))
    shutil.rmtree(Path(storage.local_path(config.layout.table("packed"))))
    with caplog.at_level("WARNING", logger="miniplm"):
        assert train(changed, reference_target(changed)) == dataclasses.replace(first, skipped=True)
    assert "config has changed" in caplog.text
    (folder(config, "reference") / "training.json").unlink()
    assert train(changed, reference_target(changed)).as_json() == {"name": "reference", "skipped": True}
    with pytest.raises(CorpusError, match="run the pack stage"):
        train(changed, reference_target(changed), retrain=True)


@pytest.mark.slow
@pytest.mark.parametrize("save", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights_in_the_same_run(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: int
) -> None:
    whole = student(config)
    shutil.copytree(folder(config, "small"), tmp_path / "whole")
    shutil.rmtree(folder(config, "small"))
    shutil.rmtree(Path(storage.local_path(config.layout.training("small"))))
    original = Checkpoints.save

    def save_and_die(self: Checkpoints, state: SavedState, *arguments: Any) -> Path:
        path = original(self, state, *arguments)
        if state.steps_done == 2 * save:
            raise Killed
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        student(config)
    assert not folder(config, "small").exists()
    monkeypatch.setattr(Checkpoints, "save", original)
    resumed = student(config)
    assert same_weights(folder(config, "small"), tmp_path / "whole")
    assert resumed["final_loss"] == whole["final_loss"]
    assert resumed["run_id"] != whole["run_id"]
    client = connect(config).MlflowClient()
    experiment = client.get_experiment_by_name("miniplm").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([experiment])}
    assert set(runs) == {whole["run_id"], resumed["run_id"]}
    assert runs[resumed["run_id"]].info.status == "FINISHED"
    curve = client.get_metric_history(resumed["run_id"], "train_loss")
    assert {point.step for point in curve} == set(range(1, 7))


@pytest.mark.slow
def test_a_model_is_trained_by_one_process_at_a_time(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.1)
    uri = config.layout.lease("train-small")
    with lease.Lease(uri, "small"), pytest.raises(CorpusError, match=r"small: the training is run by process \d+ on "):
        student(config)
    assert student(config)["skipped"] is False
    assert lease.read(uri) is None


@pytest.mark.slow
def test_a_training_whose_lease_was_taken_saves_nothing_more(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoints.save

    def save_and_lose(self: Checkpoints, *arguments: Any) -> Path:
        path = original(self, *arguments)
        storage.remove_folder(config.layout.lease("train-small"))
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_lose)
    with pytest.raises(CorpusError, match="small: the training of this process did not renew its lease in time"):
        student(config)
    assert not folder(config, "small").exists()
    checkpoints = Path(storage.local_path(config.layout.training("small")))
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-2"]


@pytest.mark.slow
def test_a_full_disk_leaves_no_part_of_a_model(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model_folder.write_weights

    def write(*arguments: Any) -> None:
        with largest_file(5000):
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "write_weights", write)
        with pytest.raises(
            MiniplmError, match=r"models/small: the model cannot be written \(.*\): free space .* step 6 is"
        ):
            student(config)
    assert not [path for path in folder(config, "small").parent.iterdir() if "small" in path.name]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", raise_no_space)
        with pytest.raises(MiniplmError, match="No space left on device"):
            student(config)
    assert not [path for path in folder(config, "small").parent.iterdir() if "small" in path.name]
    assert student(config)["steps"] == 6


def raise_no_space(source: Path, target: Path, **options: Any) -> None:
    (target / "half").write_text("written")
    raise OSError(28, "No space left on device")


def test_mlflow_holds_parameters_curve_and_lineage(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loop.peak_flops_per_second", lambda device, dtype: 1e6)
    training = student(config)
    root = Path(storage.local_path(config.root))
    assert (root / "mlflow.db").exists()
    run = connect(config).MlflowClient().get_run(training["run_id"])
    assert run.info.run_name == "small"
    assert run.info.artifact_uri.startswith((root / "mlartifacts").as_uri())
    assert run.data.params["train.learning_rate"] == "0.01"
    assert run.data.params["architecture.hidden_size"] == "16"
    wanted = {"train_loss", "learning_rate", "tokens", "tokens_per_second", "gradient_norm", "train/mfu"}
    assert wanted <= set(run.data.metrics)
    assert run.data.metrics["train_loss"] == pytest.approx(training["final_loss"])
    tags = run.data.tags
    assert tags["delta_table_uri"] == storage.redact(config.layout.table("packed/kept/bpe"))
    assert (tags["delta_table_version"], tags["refined_version"], tags["corpus"]) == ("0", "3", "kept")
    assert json.loads(tags["model_revisions"]) == {"teacher": "a" * 32}
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("packed/kept/bpe", training["manifest_hash"])
    assert dataset.tags[0].value == "training"


def test_packed_with_another_tokenizer(config: ExperimentConfig) -> None:
    path = folder(config, "tokenizer_bpe") / "miniplm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_hash": "b" * 32}))
    with pytest.raises(CorpusError, match="tokenizer_hash"):
        student(config)


def write_config_without_reference(config: ExperimentConfig) -> Path:
    """The same root with only the student, and a length in which every held-out text is one window."""
    root = Path(storage.local_path(config.root))
    raw = json.loads((root.parent / "experiment.yaml").read_text())
    del raw["reference"], raw["models"]["reference"]
    path = root.parent / "bare.yaml"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.slow
def test_the_command(config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = str(tmp_path / "experiment.yaml")
    assert main(["train", "train.steps=2", "-c", conf, "--student", "small", "train.warmup_steps=0", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["small"]
    assert (plan["status"], plan["tokens"], plan["n_parameters"] > 0) == ("to train", 2 * 4 * 16, True)
    assert plan["epochs"] == round(2 * 4 / plan["sequences_in_table"], 2)
    assert not folder(config, "small").exists()
    assert main(["train", "-c", conf, "--student", "small", "train.steps=2", "train.warmup_steps=0"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["small"]["steps"] == 2
    line = r"small: 2 steps of \d+ tokens in \d+ s, [\d,]+ tokens/s, loss of the last step \d\.\d{4} nats/token"
    assert re.fullmatch(line, printed.err.splitlines()[-1])
    assert main(["evaluate", "-c", conf, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["waits_for_training"] == ["reference"]
    assert main(["evaluate", "-c", conf]) == 1
    assert capsys.readouterr().err.startswith("miniplm: CorpusError: no trained model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "smal"], "did you mean 'small'"),
        (["--student", "small", "train.stepss=3"], "train.steps"),
        (["--student", "small", "students.small.architecture.model_type=lama"], "did you mean 'llama'"),
        (["--student", "small", "students.small.architecture.layers=2"], "no key 'layers'"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_2(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", "-c", str(tmp_path / "experiment.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("miniplm: ConfigError: ")
    assert message in error


def test_wrong_usage_is_exit_2(tmp_path: Path) -> None:
    for words in (["train"], ["train", "-c", "x", "--student", "a", "--reference"], ["train", "oops"], []):
        with pytest.raises(SystemExit) as raised:
            main(words)
        assert raised.value.code == 2


def test_no_reference_section(config: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="no such section"):
        reference_target(load_config(write_config_without_reference(config)))


@pytest.mark.slow
def test_a_training_on_s3_goes_on_on_another_machine(
    config: ExperimentConfig, fresh: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root is on S3. After a kill, a machine whose cache is empty resumes to the weights of a local training."""
    student(config)
    filesystem, place = fsspec.core.url_to_fs(f"s3a://{BUCKET}/run")
    filesystem.put(f"{fresh}/root/", f"{place}/", recursive=True)
    remote = dataclasses.replace(config, root=f"s3a://{BUCKET}/run")
    original = Checkpoints.save

    def save_and_die(self: Checkpoints, state: SavedState, *arguments: Any) -> Path:
        path = original(self, state, *arguments)
        if state.steps_done == 4:
            raise Killed
        return path

    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "first machine"))
    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        student(remote)
    monkeypatch.setattr(Checkpoints, "save", original)
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "second machine"))
    student(remote)
    fetched = storage.local_folder(remote.layout.model("small"))
    assert same_weights(folder(config, "small"), fetched)
    assert sorted(path.name for path in fetched.iterdir()) == sorted(
        path.name for path in folder(config, "small").iterdir()
    )
    assert remote.local_folder().is_relative_to(tmp_path / "second machine")
