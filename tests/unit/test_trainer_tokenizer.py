"""AutoTokenizer on a trained model's folder encodes a text as the data was packed: without a BOS, where it has none."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.config.targets import reference_target, student_target
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash, without_additions
from tests.support import tiny_models
from tests.support.tiny_models import BOS, BOS_ID, SEPARATOR
from tests.support.trainer_roots import make_root
from trainer.models.tokenizer_files import check_auto_tokenizer, read_tokenizer_files
from trainer.train import train

TEXT = "  the fox's 2024 naïve\n\n\te\u0301 東京 ---- "
TEMPLATE = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
PLAIN_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SEPARATOR, "add_bos_token": False}


def llama3_like() -> Tokenizer:
    tokenizer = tiny_models.make_tokenizer((SEPARATOR, tiny_models.CHAT_TOKEN, BOS))
    tokenizer.post_processor = processors.Sequence([BYTE_LEVEL, TEMPLATE])
    return tokenizer


def gemma_like() -> Tokenizer:
    """A vocabulary of sentencepiece's kind: visible spaces, and bytes for characters that it does not have."""
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [SEPARATOR, "<unk>", BOS, *every_byte, *string.ascii_letters, "▁", "th", "the"]
    vocabulary, merges = {token: i for i, token in enumerate(tokens)}, [("t", "h"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([SEPARATOR, BOS])
    tokenizer.post_processor = TEMPLATE
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN_CONFIG))
    return folder


def auto_ids(folder: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])


def packed_ids(folder: Path) -> list[int]:
    return list(load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_root(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), [(llama3_like, "small"), (gemma_like, "reference")])
def test_a_trained_model_has_no_bos_where_its_data_has_none(config: ExperimentConfig, make: Any, name: str) -> None:
    target = reference_target(config) if name == "reference" else student_target(config, name)
    packed = Path(storage.local_path(config.layout.tokenizer(target.tokenizer)))
    trained = Path(storage.local_path(config.layout.model(target.name)))
    # The ids of the root's packed data are of another tokenizer; here they are numbers to train on.
    saved(packed, make())
    assert auto_ids(packed) == [BOS_ID, *packed_ids(packed)], "this test could not fail"
    training = train(config, target).as_json()

    assert auto_ids(trained) == packed_ids(packed)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, SEPARATOR)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    # Per token, its scores can be compared with scores of the model that the tokenizer was copied from.
    assert training["tokenizer_hash"] == tokenizer_hash(trained) == tokenizer_hash(packed)
    model = ModelConfig(path=str(trained), context_tokens=16, window_overlap_tokens=4, document_separator=SEPARATOR)
    assert describe(name, model).bos_token is None
    saved(trained, tiny_models.make_tokenizer())
    assert tokenizer_hash(trained) == tokenizer_hash(saved(trained.parent / "other", tiny_models.make_tokenizer()))


@pytest.mark.parametrize(
    "processor",
    [
        TEMPLATE,
        processors.Sequence([BYTE_LEVEL, TEMPLATE]),
        processors.TemplateProcessing(single=f"$A {SEPARATOR}", special_tokens=[(SEPARATOR, 0)]),
        processors.BertProcessing((SEPARATOR, 0), (BOS, BOS_ID)),
        processors.RobertaProcessing((SEPARATOR, 0), (BOS, BOS_ID)),
    ],
)
def test_nothing_is_added_cut_off_or_drawn(tmp_path: Path, processor: Any) -> None:
    tokenizer = tiny_models.make_tokenizer((SEPARATOR, tiny_models.CHAT_TOKEN, BOS))
    plain = saved(tmp_path / "plain", tokenizer)
    tokenizer.post_processor = processor
    tokenizer.model.dropout = 0.5
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50, pad_id=0, pad_token=SEPARATOR)
    changed = Tokenizer.from_buffer(without_additions(tokenizer.to_str().encode()))
    assert {tuple(changed.encode(TEXT).ids) for _ in range(20)} == {tuple(packed_ids(plain))}


def test_a_file_that_adds_nothing_stays_as_it_is() -> None:
    tokenizer = tiny_models.make_tokenizer()
    assert tokenizer.post_processor is not None
    for content in (tokenizer.to_str(pretty=True), tokenizer.to_str(pretty=False)):
        assert without_additions(content.encode()) == content.encode()


@pytest.mark.parametrize(("family", "warns"), [("llama", False), ("gemma2", False), ("qwen2", True)])
def test_a_class_of_transformers_that_takes_the_vocabulary_alone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, warns: bool
) -> None:
    """Qwen2's cuts digits apart and composes accents, whatever the tokenizer.json says."""
    packed, folder = saved(tmp_path / "packed", llama3_like()), tmp_path / "model"
    tiny_models.make_config(family).save_pretrained(folder)
    read_tokenizer_files(str(packed)).write(folder)
    check_auto_tokenizer(folder, "small")
    assert PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"] == packed_ids(packed)
    assert ("PreTrainedTokenizerFast.from_pretrained" in caplog.text) == warns
