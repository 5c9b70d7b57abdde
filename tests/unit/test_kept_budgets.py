"""Token budgets in the records of models, and the scorers that are made with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf import storage
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.layout import Root
from miniplm_udf.scores.models import keep_tokens_per_batch, kept_tokens_per_batch
from miniplm_udf.scoring.batch_size import SearchResult
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support import tiny_models

H200 = "NVIDIA H200/bfloat16"


@pytest.fixture
def description() -> ModelDescription:
    return ModelDescription(
        model_id="teacher", tokenizer_hash="t", dtype="bfloat16", context_tokens=64, window_overlap_tokens=8,
        context_prefix="none", document_separator="<sep>", document_separator_id=0, prefix_token_id=None,
        vocab_size=8, n_parameters=1, weights_hash="w", path="p",
    )  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"))


def test_budgets_are_kept_by_place(layout: Root, description: ModelDescription) -> None:
    uri = layout.model_record("teacher")
    keep_tokens_per_batch(layout, description, {H200: 131_072})
    assert storage.read_json(uri) is None, "without a record there is nothing to keep it in"
    storage.write_json(uri, description.to_dict())
    assert kept_tokens_per_batch(layout, description) == {}
    keep_tokens_per_batch(layout, description, {H200: 131_072})
    keep_tokens_per_batch(layout, description, {"NVIDIA L4/bfloat16": 16_384})
    assert kept_tokens_per_batch(layout, description) == {H200: 131_072, "NVIDIA L4/bfloat16": 16_384}
    # A newer search replaces it.
    keep_tokens_per_batch(layout, description, {H200: 65_536})
    assert kept_tokens_per_batch(layout, description)[H200] == 65_536
    assert ModelDescription.from_dict(storage.read_json(uri)) == description


def test_a_record_without_news_is_not_written(layout: Root, description: ModelDescription) -> None:
    path = Path(storage.local_path(layout.model_record("teacher")))
    storage.write_json(str(path), description.to_dict())
    keep_tokens_per_batch(layout, description, {H200: 64})
    before = path.stat().st_ino
    keep_tokens_per_batch(layout, description, {H200: 64})
    assert path.stat().st_ino == before


def test_another_revision_keeps_nothing(layout: Root, description: ModelDescription) -> None:
    storage.write_json(layout.model_record("teacher"), description.to_dict() | {"tokens_per_batch": {H200: 64}})
    longer = dataclasses.replace(description, context_tokens=128, model_revision="")
    assert longer.model_revision != description.model_revision
    assert kept_tokens_per_batch(layout, longer) == {}
    keep_tokens_per_batch(layout, longer, {H200: 128})
    assert kept_tokens_per_batch(layout, description) == {H200: 64}


@pytest.mark.parametrize("budgets", [None, 64, [64], {H200: "64"}, {H200: 0}, {H200: True}, {H200: 1.5}])
def test_what_is_no_budget_is_not_used(layout: Root, description: ModelDescription, budgets: Any) -> None:
    storage.write_json(layout.model_record("teacher"), description.to_dict() | {"tokens_per_batch": budgets})
    assert kept_tokens_per_batch(layout, description) == {}
    keep_tokens_per_batch(layout, description, {H200: 32})
    assert kept_tokens_per_batch(layout, description) == {H200: 32}


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_record_that_is_none_keeps_nothing(layout: Root, description: ModelDescription, content: str) -> None:
    uri = layout.model_record("teacher")
    storage.write_text(uri, content)
    assert kept_tokens_per_batch(layout, description) == {}
    keep_tokens_per_batch(layout, description, {H200: 64})
    assert storage.read_text(uri) == content


def test_a_scorer_on_a_gpu_takes_the_budget_of_its_place(
    description: ModelDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    factory = ModelScorerFactory(ModelConfig(path="p"), description, ScoreConfig(), kept={H200: 64, "cpu/bfloat16": 7})
    assert factory._tokens_per_batch("cuda:0", 1) == 64
    assert factory._tokens_per_batch("cuda:0", 2) is None, "two processes share it"
    eager = dataclasses.replace(factory, settings=ScoreConfig(attention="eager"))
    assert eager._tokens_per_batch("cuda:0", 1) is None, "other attention needs other memory"
    assert dataclasses.replace(eager, kept={f"{H200}/eager": 32})._tokens_per_batch("cuda:0", 1) == 32
    assert factory._tokens_per_batch("cpu", 1) is None
    assert dataclasses.replace(factory, settings=ScoreConfig(tokens_per_batch=5))._tokens_per_batch("cuda:0", 1) == 5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert factory._tokens_per_batch("cuda:0", 1) is None
    # A process keeps its scorer from job to job, with the budget that it has.
    assert factory.key == dataclasses.replace(factory, kept={}).key


def test_a_cpu_takes_the_measured_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    config = ModelConfig(path=str(tiny_models.make_model_folder(tmp_path)), context_tokens=64, window_overlap_tokens=8)
    made = describe("teacher", config, "float32")
    scorer: Any = ModelScorerFactory(config, made, ScoreConfig(attention="eager"), kept={"cpu/float32/eager": 7})()
    assert scorer.tokens_per_batch == 1024
    usage = scorer.usage()
    assert (usage.place, usage.found_tokens_per_batch) == ("cpu/float32/eager", None), "nothing was searched"


@pytest.mark.parametrize("is_general", [True, False])
def test_a_scorer_states_the_budget_that_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_general: bool
) -> None:
    """Also after passes that did not fit, because other programs may have held the memory then."""
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Scorer, "_search_tokens_per_batch", lambda self, *_: SearchResult(10_000, is_general))
    made = tiny_models.make_scorer(tiny_models.make_model_folder(tmp_path))
    model = tiny_models.make_model("llama")
    # A kind of device for which a budget is searched; the model is on the CPU.
    scorer = Scorer(model, tiny_models.make_tokenizer(), made.description, None, "xpu")
    assert scorer.tokens_per_batch == 10_000
    scorer._use_smaller_batches(8, 5000)
    assert scorer.usage().found_tokens_per_batch == (10_000 if is_general else None)
