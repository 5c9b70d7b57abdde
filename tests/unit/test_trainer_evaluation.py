"""Evaluation of trained models: the numbers, what is skipped, external sets, and evaluation during a training."""

import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import write_deltalake
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.targets import all_targets, student_target
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError, ModelLoadError
from miniplm_udf.store.model_records import read_evaluation, read_training
from tests.support.tracking_store import own_tracking_store
from tests.support.trainer_roots import LENGTH, MakeConfig, make_root, some_texts, write_config, write_instances
from trainer.__main__ import main
from trainer.evaluation import losses, texts
from trainer.evaluation import run as evaluation
from trainer.evaluation.during_training import TrainingEvaluation
from trainer.evaluation.records import EvaluateResult
from trainer.tracking.run import Run
from trainer.tracking.store import connect
from trainer.train import train

pytestmark = pytest.mark.slow

SEPARATOR_ID = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a trained student, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_root(folder)
    with own_tracking_store():
        train(config, student_target(config, "small"))
    return folder


@pytest.fixture
def make(trained: Path, tmp_path: Path) -> Iterator[MakeConfig]:
    """Makes the config of a copy of the root, with overrides."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def config(*overrides: str, **train_keys: Any) -> ExperimentConfig:
        return load_config(write_config(tmp_path, tmp_path / "root", **train_keys), overrides)

    with own_tracking_store():
        yield config


def folder(config: ExperimentConfig, name: str = "small") -> Path:
    return Path(storage.local_path(config.layout.model(name)))


def evaluate(config: ExperimentConfig) -> EvaluateResult:
    """Evaluates the student."""
    return evaluation.evaluate(config, [student_target(config, "small")])["small"]


def metrics(config: ExperimentConfig) -> dict[str, float]:
    """Metrics of the student's MLflow run."""
    training = read_training(config, "small")
    assert training is not None
    values: dict[str, float] = connect(config).MlflowClient().get_run(training.run_id).data.metrics
    return values


def nats_of_ids(config: ExperimentConfig, ids: list[int]) -> list[float]:
    """-log p of each token after the first, by the model's own logits."""
    model, tokens = AutoModelForCausalLM.from_pretrained(folder(config)), torch.tensor([ids])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=tokens[:, :-1]).logits, -1)
    nats: list[float] = (-log_p.gather(2, tokens[:, 1:, None])).flatten().tolist()
    return nats


def test_every_byte_counts_and_nothing_is_repeated(make: MakeConfig) -> None:
    config = make()
    with pytest.raises(CorpusError, match="train --reference"):
        evaluation.evaluate(config, all_targets(config))
    train(config, all_targets(config)[0])
    results = evaluation.evaluate(config, all_targets(config))
    assert set(results) == {"reference", "small"}
    written = json.loads((folder(config) / "evaluation.json").read_text())
    assert results["small"].as_json() == {**written, "skipped": False}
    heldout, rows = written["sets"]["heldout"], list(texts.heldout_set(config).rows())
    assert heldout["n_instances"] == len(rows) == 6
    assert heldout["n_bytes"] == sum(len(row.text.encode()) for row in rows if isinstance(row, texts.TextRow))
    assert sum(numbers["n_bytes"] for numbers in heldout["by_source"].values()) == heldout["n_bytes"]
    nats = heldout["nats_per_token"] * heldout["n_tokens"]
    assert heldout["bits_per_byte"] == pytest.approx(nats / np.log(2) / heldout["n_bytes"])
    logged = metrics(config)
    for key in ("nats_per_token", "nats_per_instance_mean", "official_loss", "bits_per_byte"):
        assert logged[f"heldout_{key}"] == pytest.approx(heldout[key])
    assert logged["heldout_bits_per_byte/books"] == pytest.approx(heldout["by_source"]["books"]["bits_per_byte"])
    again = evaluation.evaluate(config, all_targets(config))
    assert all(result.skipped for result in again.values())
    assert again["small"].evaluation == results["small"].evaluation == read_evaluation(config, "small")
    del heldout["by_source"]["books"]["n_bytes"]
    (folder(config) / "evaluation.json").write_text(json.dumps(written))
    assert not evaluate(config).skipped


def test_the_numbers_equal_a_plain_forward_pass(make: MakeConfig) -> None:
    short = ["stone river", "the green tea."]
    config = make("evaluate.inputs.short.path=" + str(write_jsonl(make().root, short)))
    loss = evaluate(config).evaluation.sets["short"]
    tokenizer = Tokenizer.from_file(str(folder(config) / "tokenizer.json"))
    nats = [nats_of_ids(config, [SEPARATOR_ID, *tokenizer.encode(text).ids]) for text in short]
    assert loss.n_tokens == sum(map(len, nats))
    assert loss.nats_per_token == pytest.approx(sum(map(sum, nats)) / loss.n_tokens, abs=1e-4)
    assert loss.nats_per_instance_mean == pytest.approx(np.mean([np.mean(each) for each in nats]), abs=1e-4)


def test_the_official_loss_is_that_of_the_official_instances(make: MakeConfig) -> None:
    """Documents with separators behind them, cut to sequences of at most 17 tokens; each predicts its own tokens."""
    rows = ["stone river walks and the green. tea", "green tea walks and the river " * 7, "tea"]
    config = make("evaluate.inputs.short.path=" + str(write_jsonl(make().root, rows)))
    loss = evaluate(config).evaluation.sets["short"]
    tokenizer = Tokenizer.from_file(str(folder(config) / "tokenizer.json"))
    ids = [i for row in rows for i in [*tokenizer.encode(row).ids, SEPARATOR_ID]]
    cuts, start = [], 0
    while len(ids) - start > LENGTH + 1:
        window = ids[start : start + LENGTH + 1]
        marks = [i for i, token in enumerate(window) if token == SEPARATOR_ID or tokenizer.decode([token]) == "."]
        start += (marks[-1] + 1) if marks else len(window)
        cuts.append(start)
    instances = [ids[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    means = []
    for instance in instances:
        nats = nats_of_ids(config, instance)
        counted = [n for n, before in zip(nats, instance, strict=False) if before != SEPARATOR_ID]
        means.append(np.mean(counted))
    assert len(instances) > len(rows)
    assert max(map(len, instances)) == LENGTH + 1
    assert loss.official_loss == pytest.approx(np.mean(means), abs=1e-4)


def write_jsonl(root: str, rows: list[Any], name: str = "rows") -> Path:
    """A file next to the root: a text becomes an object, bytes stay as they are."""
    path = Path(storage.local_path(root)).parent / f"{name}.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps({"text": row}).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_awkward_sources_are_evaluated_and_tracked(make: MakeConfig) -> None:
    config = make()
    sources = ["", "..", "x" * 300, "维基", "百科", "a/b", "a_b", "Web"]
    instances = Path(storage.local_path(config.layout.table("instances")))
    shutil.rmtree(instances)
    write_instances(instances, some_texts(len(sources), seed=3), sources, ["heldout"] * len(sources))
    result = evaluate(config).evaluation.sets["heldout"]
    assert set(result.by_source) == set(sources)
    by_source = [value for name, value in metrics(config).items() if name.startswith("heldout_bits_per_byte/")]
    assert sorted(by_source) == pytest.approx(sorted(loss.bits_per_byte for loss in result.by_source.values()))


def test_a_model_that_lost_a_weight_is_not_evaluated(make: MakeConfig) -> None:
    config = make()
    file = folder(config) / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "up_proj" not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 missing \(model\.layers\.0\.mlp\.up_proj\.weight\)"):
        evaluate(config)
    assert not (folder(config) / "evaluation.json").exists()


def test_no_heldout_text_and_the_bound_of_instances(make: MakeConfig) -> None:
    config = make("evaluate.max_instances_per_source=1")
    rows = texts.heldout_set(config).rows()
    assert sorted(row.source for row in rows if isinstance(row, texts.TextRow)) == ["books", "web"]
    shutil.rmtree(Path(storage.local_path(config.layout.table("instances"))))
    with pytest.raises(CorpusError, match="run the ingest stage"):
        texts.heldout_set(config)
    with pytest.raises(ConfigError, match=r"expected something to evaluate on.*evaluate\.inputs"):
        evaluate(make("ingest.split.heldout=0"))


def external(make: MakeConfig) -> ExperimentConfig:
    """The same texts as JSON lines, as Parquet, and as version 0 of a Delta table whose newest version has more."""
    root, rows = make().root, some_texts(5, seed=7)
    base = Path(storage.local_path(root)).parent
    bad = [b'{"text": 3}', b"{oops", b"", b'{"text": ""}', b'{"body": "x"}']
    lines = write_jsonl(root, [*rows[:2], *bad, *rows[2:]])
    pq.write_table(pa.table({"body": [*rows, None]}), base / "rows.parquet")
    write_deltalake(str(base / "delta"), pa.table({"text": rows}))
    write_deltalake(str(base / "delta"), pa.table({"text": some_texts(3, seed=8)}), mode="append")
    sets = {
        "lines": {"path": str(lines)},
        "parquet": {"path": str(base / "rows.parquet"), "text_column": "body"},
        "delta": {"path": str(base / "delta"), "version": 0},
    }
    return make(f"evaluate.inputs={json.dumps(sets)}", "ingest.split.heldout=0")


def test_external_sets_of_each_format_have_the_same_losses(make: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = external(make)
    with caplog.at_level(logging.WARNING, "miniplm"):
        sets = evaluate(config).evaluation.sets
    assert list(sets) == ["lines", "parquet", "delta"]
    numbers = [(loss.nats_per_token, loss.official_loss, loss.n_instances, loss.n_bytes) for loss in sets.values()]
    assert numbers[0] == pytest.approx(numbers[1])
    assert numbers[0] == pytest.approx(numbers[2])
    assert numbers[0][2] == 5
    assert sets["lines"].bad_rows == {"text_not_string": 1, "invalid_json": 1, "empty_text": 1, "missing_text": 1}
    assert sets["parquet"].bad_rows == {"missing_text": 1}
    assert (sets["delta"].version, sets["parquet"].version) == (0, None)
    assert list(sets["lines"].by_source) == ["lines"]
    assert "lines: 4 bad rows are left out" in caplog.text
    assert "text_not_string in " in caplog.text
    assert "rows.jsonl line 3" in caplog.text
    assert metrics(config)["evaluate/delta/nats_per_token"] == pytest.approx(sets["delta"].nats_per_token)


def test_only_what_has_changed_is_evaluated_again(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    original = losses.EvaluatedModel.score

    def score(self: losses.EvaluatedModel, chosen: texts.EvaluationSet) -> Any:
        if chosen.name == "parquet" and scored.count("parquet") == 0:
            scored.append("parquet")
            raise KeyboardInterrupt  # as a kill would end it
        scored.append(chosen.name)
        return original(self, chosen)

    monkeypatch.setattr(losses.EvaluatedModel, "score", score)
    config = external(make)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    evaluate(config)
    assert scored == ["lines", "parquet", "parquet", "delta"]
    write_jsonl(config.root, some_texts(4, seed=9))
    assert list(evaluate(config).evaluation.sets) == ["lines", "parquet", "delta"]
    assert scored[4:] == ["lines"]
    newest = dataclasses.replace(config.evaluate.inputs["delta"], version=None)
    inputs = {"delta": newest}
    changed = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, inputs=inputs))
    assert list(evaluate(changed).evaluation.sets) == ["delta"]
    assert scored[5:] == ["delta"]
    # A model that was trained again is evaluated again.
    train(changed, student_target(make(seed=5), "small"))
    assert not evaluate(changed).skipped


def test_numbers_that_mlflow_did_not_take_are_logged_by_the_next_run(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "start", lambda *arguments: None)
        assert evaluate(config).evaluation.run_id is None
    assert "heldout_nats_per_token" not in metrics(config)
    result = evaluate(config)
    assert result.skipped
    assert result.evaluation.run_id is not None
    assert "heldout_nats_per_token" in metrics(config)


def test_one_student_by_name(make: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    conf = str(tmp_path / "experiment.yaml")
    assert main(["evaluate", "-c", conf]) == 1  # the reference is not trained
    capsys.readouterr()
    assert main(["evaluate", "-c", conf, "--student", "small", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["models"], plan["waits_for_training"]) == (["small"], [])
    assert main(["evaluate", "--student", "small", "-c", conf]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["small"]
    assert main(["evaluate", "--student", "smal", "-c", conf]) == 2
    assert "did you mean 'small'" in capsys.readouterr().err


def test_an_evaluation_during_training_changes_no_bit(make: MakeConfig) -> None:
    """The curve ends with the numbers of the finished model, and the weights are those of an unwatched training."""
    plain, watched = make(), make(evaluate_every_steps=2)
    before = (folder(plain) / "model.safetensors").read_bytes()
    assert train(watched, student_target(watched, "small")).skipped  # the key does not change the result
    train(watched, student_target(watched, "small"), retrain=True)
    assert (folder(watched) / "model.safetensors").read_bytes() == before
    run_id = getattr(read_training(watched, "small"), "run_id", None)
    client = connect(watched).MlflowClient()
    curve = client.get_metric_history(run_id, "during_training/heldout_nats_per_token")
    assert [point.step for point in curve] == [2, 4, 6]
    assert curve[0].value > curve[-1].value
    finished = evaluate(watched).evaluation.sets["heldout"]
    assert curve[-1].value == pytest.approx(finished.nats_per_token, rel=1e-6)


def test_an_evaluation_leaves_the_random_generators_as_they_are(make: MakeConfig) -> None:
    config = make()
    watch = TrainingEvaluation(config, student_target(config, "small"))

    def write(path: Path) -> None:
        shutil.copytree(folder(config), path, dirs_exist_ok=True)
        random.random(), np.random.random(), torch.rand(1)

    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]
    assert watch.measure(write)["during_training/heldout_bits_per_byte"] > 0
    assert [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()] == states  # type: ignore[index]


def test_a_training_that_cannot_be_evaluated_is_refused_before_its_first_step(make: MakeConfig) -> None:
    config = make("ingest.split.heldout=0", evaluate_every_steps=2)
    with pytest.raises(ConfigError, match=r"train\.evaluate_every_steps: expected a text to evaluate on"):
        train(config, student_target(config, "small"), retrain=True)
    with pytest.raises(ConfigError, match=r"train\.evaluate_every_steps: expected 0"):
        make(evaluate_every_steps=-1)


def test_an_evaluation_that_cannot_write_the_weights_is_one_line(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(evaluate_every_steps=4)

    def no_space(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.training.write_weights", no_space)
    with pytest.raises(MiniplmError, match=r"^train\.evaluate_every_steps: .*No space left.*TMPDIR; the same command"):
        train(config, student_target(config, "small"), retrain=True)
    monkeypatch.undo()
    # The checkpoint before is used.
    assert not train(config, student_target(config, "small"), retrain=True).skipped
