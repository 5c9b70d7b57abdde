"""The token in front of a model's text: which file decides, what a description says, and the trial at load."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.estimate.measure import _count
from miniplm_udf.scoring import prefix_probe
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.gguf_facts import GgufFile
from miniplm_udf.scoring.gguf_tokenizers import adds_bos
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.prefix_probe import prefix_warnings
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.scoring.weights import SOURCE_FILE
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support import tiny_models
from tests.support.tiny_models import BOS, BOS_ID, CHAT_TOKEN, SEPARATOR, VOCAB_SIZE, make_bos_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))


def small(path: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **({"context_tokens": 64, "window_overlap_tokens": 8} | changes))


def write(path: Path, **values: Any) -> None:
    plain = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(plain | values))


@pytest.mark.parametrize(
    ("stated_by", "words"),
    [
        ("add_bos_token", f"{BOS} in front of every window (add_bos_token of tokenizer_config.json)"),
        ("post_processor", f"{BOS} in front of every window (post-processor of tokenizer.json)"),
        (None, "no BOS (its tokenizer adds none)"),
    ],
)
def test_the_tokenizers_files_decide(tmp_path: Path, stated_by: str | None, words: str) -> None:
    found = describe("m", small(make_bos_folder(tmp_path, "llama", stated_by)))
    bos = (None, None) if stated_by is None else (BOS, BOS_ID)
    assert (found.bos_token, found.bos_token_id, found.prefix) == (*bos, words)
    assert found.to_dict()["prefix"] == words, "the model's record says it"


def test_the_first_file_that_says_something_decides(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    write(folder / "tokenizer_config.json", add_bos_token=False)
    assert describe("m", small(folder)).prefix == "no BOS (add_bos_token of tokenizer_config.json is false)"
    write(folder / SOURCE_FILE, add_bos_token=True, bos_token_id=BOS_ID, sha256="0" * 64, quantised=False)
    assert describe("m", small(folder)).prefix == f"{BOS} in front of every window (tokenizer.ggml.add_bos_token)"
    (folder / "training.json").write_text("{}")
    assert describe("m", small(folder)).bos_token_id is None, "the trainer packs no BOS, whatever its tokenizer adds"


def test_the_config_overrides_the_files(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    assert describe("m", small(folder, bos_token="none")).bos_token is None
    found = describe("m", small(folder, bos_token=CHAT_TOKEN, context_prefix="token"))
    assert (found.bos_token_id, found.prefix_token_id) == (1, 1)
    found = describe("m", small(folder, context_prefix="token", prefix_token=SEPARATOR))
    assert (found.bos_token_id, found.prefix_token_id) == (BOS_ID, 0)
    with pytest.raises(ConfigError, match=r"models\.m\.bos_token: expected one token"):
        describe("m", small(folder, bos_token="two tokens"))


@pytest.mark.parametrize("processor", ["RobertaProcessing", "BertProcessing"])
def test_other_post_processors(tmp_path: Path, processor: str) -> None:
    folder = make_bos_folder(tmp_path, "llama", None)
    write(folder / "tokenizer.json", post_processor={
        "type": processor, "sep": [SEPARATOR, 0], "cls": [BOS, BOS_ID], "trim_offsets": True, "add_prefix_space": False
    })  # fmt: skip
    assert describe("m", small(folder)).bos_token == BOS


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = make_bos_folder(tmp_path, "llama", "add_bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SEPARATOR, "add_bos_token": True}))
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"bos_token_id": None}))
    with pytest.raises(ConfigError, match="no file there names the BOS"):
        describe("m", small(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SEPARATOR}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CHAT_TOKEN} {BOS} $A", special_tokens=[(CHAT_TOKEN, 1), (BOS, BOS_ID)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="at most one token in front of a text, found 2"):
        describe("m", small(folder))
    assert describe("m", small(folder, bos_token=BOS)).bos_token_id == BOS_ID


@pytest.mark.parametrize(
    ("facts", "adds"),
    [
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.model": "llama"}, False),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.model": "gpt2"}, True),
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, False),
    ],
)
def test_what_a_gguf_states_or_leaves_out(facts: dict[str, Any], adds: bool) -> None:
    assert adds_bos(GgufFile(Path("x.gguf"), facts, {}, None)) is adds


def test_the_bos_comes_on_top_of_the_context(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "gpt2", "post_processor")
    with pytest.raises(ConfigError, match=r"at most 127 .*less its BOS.*found 128"):
        describe("m", small(folder, context_tokens=128))
    rows = [{"text": "x" * 200, "segment_ends": [], "ends_document": False}]
    tokens = []
    for bos in ("auto", "none"):
        config = small(folder, context_tokens=127, bos_token=bos)
        scorer = tiny_models.make_scorer(folder, context_tokens=127, window_overlap_tokens=8, bos_token=bos)
        [result] = scorer.score([rows[0]["text"]], [[]], [False])
        counts = _count(config, scorer.description, rows)
        assert counts.scored == result.n_tokens == 199
        tokens.append(counts.tokens[0])
    assert tokens[0] == tokens[1] + 2, "a BOS in each of two windows is work that the estimate counts"


def test_revisions_of_models_without_a_bos_stay(tmp_path: Path) -> None:
    """Golden values from releases without prefixes: the scores of a model without a prefix stay valid."""
    plain = ModelDescription(
        model_id="m", tokenizer_hash="t", dtype="float32", context_tokens=64, window_overlap_tokens=16,
        context_prefix="none", document_separator="<sep>", document_separator_id=0, prefix_token_id=None, vocab_size=7,
        n_parameters=1, weights_hash="w", path="p",
    )  # fmt: skip
    assert plain.model_revision == "836a3788e204600b7aa065dc6c3b5c8b"
    token = dataclasses.replace(plain, context_prefix="token", prefix_token_id=5, model_revision="")
    assert token.model_revision == "69aacf2a733d594e7198dee166bbe5a0"
    with_bos = dataclasses.replace(plain, bos_token="<bos>", bos_token_id=2, model_revision="")
    other = dataclasses.replace(plain, bos_token="<s>", bos_token_id=3, model_revision="")
    assert len({plain.model_revision, with_bos.model_revision, other.model_revision}) == 3


# --- the trial at load ---


class Decoder(torch.nn.Module):
    """Knows nothing of a text that begins as it should; is sure of the wrong token everywhere in any other."""

    def __init__(self, wants_bos: bool) -> None:
        super().__init__()
        self.wants_bos = wants_bos

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        is_lost_B = (input_ids[:, 0] == BOS_ID) != self.wants_bos
        return (is_lost_B[:, None, None] * torch.ones(*input_ids.shape, 1) * 10.0,)


class TrialModel(torch.nn.Module):
    def __init__(self, wants_bos: bool) -> None:
        super().__init__()
        self.base_model = Decoder(wants_bos)
        self.head = torch.nn.Linear(1, VOCAB_SIZE, bias=False)
        self.head.weight = torch.nn.Parameter((torch.arange(VOCAB_SIZE) == 0).float()[:, None], requires_grad=False)
        self.config = tiny_models.make_config("llama")
        self.dtype = torch.float32

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@pytest.mark.parametrize("wants_bos", [True, False])
@pytest.mark.parametrize("bos_token", ["auto", "none"])
def test_a_model_that_is_better_the_other_way_is_warned_about(tmp_path: Path, wants_bos: bool, bos_token: str) -> None:
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    description = describe("m", small(folder, bos_token=bos_token, context_prefix="token"))
    tokenizer = load_tokenizer(folder)
    found = prefix_warnings(TrialModel(wants_bos), tokenizer, description, folder, "cpu")
    if (bos_token == "auto") == wants_bos:
        assert found == []
        return
    [warning] = found
    right = math.log(VOCAB_SIZE)
    wrong = math.log(VOCAB_SIZE - 1 + math.exp(10.0))
    way, key = ("without", BOS) if wants_bos else ("with", "none")
    assert f"{wrong:.2f} nats a token {way} {BOS} in front of every window, and {right:.2f} the other way" in warning
    assert warning.endswith(f"set models.m.bos_token: {key}")


def test_a_trial_that_cannot_be_made_is_not(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "llama", None)
    description = describe("m", small(folder))
    few = dataclasses.replace(description, vocab_size=50)
    assert prefix_warnings(TrialModel(True), load_tokenizer(folder), few, folder, "cpu") == []
    assert len(prefix_warnings(TrialModel(True), load_tokenizer(folder), description, folder, "cpu")) == 1


def test_the_trials_warning_is_logged_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefix_probe, "MARGIN_NATS", -1000.0)
    config = small(make_bos_folder(tmp_path, "llama", "post_processor"), dtype="float32")
    scorer = ModelScorerFactory(config, describe("m", config), ScoreConfig())()
    [warning] = scorer.warnings
    assert warning in caplog.text
