"""Where a model's files are, what it is, and what is refused: each with its message."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scoring.description import ModelDescription, with_absolute_path
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import check_head, describe, load_model
from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash
from tests.support import tiny_models
from tests.support.tiny_models import CHAT_TOKEN, SEPARATOR, VOCAB_SIZE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small(path: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **({"context_tokens": 64, "window_overlap_tokens": 8} | changes))


# --- the tokenizer ---


def test_offsets_tile_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_models.make_model_folder(tmp_path))
    text = " hello  world é <|endoftext|> "
    encoding = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    covered = 0
    for start, end in encoding.offsets:
        assert start <= covered
        covered = max(covered, end)
    assert covered == len(text)
    assert encoding.offsets[0] == (0, 1)
    assert tokenizer.token_to_id(SEPARATOR) not in encoding.ids


def test_long_text_is_not_truncated(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("hello world, hello world", add_special_tokens=False).ids) in range(4, 64)


def test_tokenizer_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="fast tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelLoadError, match="fast tokenizer"):
        tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="refuses"):
        load_tokenizer(tmp_path)


# --- where the files are ---


def test_folders_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.make_model_folder(tmp_path, name="one")
    assert model_folder(small(folder)) == folder
    assert model_folder(small(folder.as_uri())) == folder
    monkeypatch.chdir(tmp_path)
    assert model_folder(small("one")) == folder
    absolute = with_absolute_path(small("one"))
    monkeypatch.chdir("/")
    assert model_folder(absolute) == folder
    assert with_absolute_path(small("owner/name")).path == "owner/name"


def test_remote_uri_is_fetched_once(tmp_path: Path) -> None:
    import fsspec

    folder = tiny_models.make_model_folder(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/bucket/model/", recursive=True)
    fetched = model_folder(small("memory://bucket/model"))
    assert tokenizer_hash(fetched) == tokenizer_hash(folder)
    (fetched / "mark").touch()
    again = model_folder(small("memory://bucket/model"))
    assert again == fetched
    assert (again / "mark").exists(), "fetched a second time"


def test_package_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder = tiny_models.make_model_folder(package, name="tiny")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_folder(small("package:some_models/tiny")) == folder
    with pytest.raises(ModelLoadError, match="holds no 'other'"):
        model_folder(small("package:some_models/other"))
    with pytest.raises(ModelLoadError, match="no package 'no_such_models'"):
        model_folder(small("package:no_such_models/tiny"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "file:///no/such", "no.gguf", "a/b/c/d"])
def test_missing_path(path: str) -> None:
    with pytest.raises(ModelLoadError, match="found no such file or folder"):
        model_folder(small(path))


def test_missing_hub_name_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelLoadError, match=r"no such local folder.*hub name.*offline"):
        model_folder(small("owner/name"))


def test_null_path() -> None:
    with pytest.raises(ModelLoadError, match="found null"):
        model_folder(ModelConfig())


def test_incomplete_folders(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelLoadError, match="fast tokenizer"):
        model_folder(small(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        model_folder(small(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        model_folder(small(folder))


def test_a_missing_tokenizer_json_is_made(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": SEPARATOR, "unk_token": SEPARATOR})
    )
    made = model_folder(small(folder))
    assert made != folder
    assert model_folder(small(folder)) == made
    assert describe("m", small(folder)).document_separator_id == 0
    assert len(load_tokenizer(made).encode("hello world", add_special_tokens=False).ids) < 11


# --- what the model is ---


def test_description(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    found = describe("teacher", small(folder))
    assert found.model_id == "teacher"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert found.n_parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert (found.document_separator, found.document_separator_id, found.prefix_token_id) == (SEPARATOR, 0, None)
    assert (found.vocab_size, found.context_tokens, found.warnings) == (VOCAB_SIZE, 64, [])
    assert len(found.model_revision) == len(found.tokenizer_hash) == len(found.weights_hash) == 32
    assert ModelDescription.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_revision_changes_with_all_that_changes_a_score_and_only_that(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path, name="one")
    base = describe("m", small(folder)).model_revision
    same = tiny_models.make_model_folder(tmp_path, name="copy")
    assert describe("other_alias", small(same)).model_revision == base
    assert describe("m", small(folder, prefix_token=CHAT_TOKEN)).model_revision == base
    others = [
        describe("m", small(tiny_models.make_model_folder(tmp_path, name="two", seed=1))),
        describe("m", small(folder, context_tokens=32)),
        describe("m", small(folder, window_overlap_tokens=4)),
        describe("m", small(folder, document_separator=CHAT_TOKEN)),
        describe("m", small(folder, context_prefix="token")),
        describe("m", small(folder, context_prefix="token", prefix_token=CHAT_TOKEN)),
        describe("m", small(folder, dtype="bfloat16")),
    ]
    assert len({base, *(other.model_revision for other in others)}) == len(others) + 1


def test_weights_that_change_in_place_are_another_model(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    before = describe("m", small(folder))
    tiny_models.make_model(seed=5).save_pretrained(folder)
    after = describe("m", small(folder))
    assert before.model_revision != after.model_revision
    assert before.tokenizer_hash == after.tokenizer_hash


def test_a_change_of_the_models_code_or_config_is_another_model(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    found = [describe("m", small(folder)).model_revision]
    for name, text in (("modeling_own.py", "a = 1\n"), ("modeling_own.py", "a = 2\n"), ("README.md", "words\n")):
        (folder / name).write_text(text)
        found.append(describe("m", small(folder)).model_revision)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    found.append(describe("m", small(folder)).model_revision)
    assert len(set(found)) == 4
    assert found[2] == found[3], "a file that no score depends on is no part of the revision"


def test_dtype_is_settled_once(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    assert describe("m", small(folder)).dtype == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert describe("m", small(folder), dtype="bfloat16").dtype == "bfloat16"
    assert describe("m", small(folder, dtype="float32"), dtype="bfloat16").dtype == "float32"
    model = load_model(small(folder), describe("m", small(folder), dtype="bfloat16"))
    assert next(model.parameters()).dtype == torch.bfloat16


def test_chat_separator_has_to_be_named(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path, eos_token=CHAT_TOKEN)
    with pytest.raises(ConfigError, match=r"set models\.m\.document_separator.*<\|endoftext\|>"):
        describe("m", small(folder))
    found = describe("m", small(folder, document_separator=SEPARATOR))
    assert found.document_separator_id == 0
    assert "chat-tuned" in found.warnings[0]


def test_chat_template_with_an_unknown_eos_has_to_be_named(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path, eos_token="hello", chat_template="{{ messages }}")
    with pytest.raises(ConfigError, match="document_separator"):
        describe("m", small(folder))
    base = tiny_models.make_model_folder(tmp_path, name="base", chat_template="{{ messages }}")
    assert describe("m", small(base)).document_separator == SEPARATOR


def test_trained_model_with_its_teachers_tokenizer_is_no_chat_model(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path, eos_token=CHAT_TOKEN)
    (folder / "training.json").write_text("{}")
    assert describe("m", small(folder, document_separator=SEPARATOR)).warnings == []


@pytest.mark.parametrize("changes", [{"document_separator": "<eos>"}, {"prefix_token": "two tokens"}])
def test_tokens_that_are_none(tmp_path: Path, changes: dict[str, str]) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    with pytest.raises(ConfigError, match=f"models.m.{next(iter(changes))}: expected one token"):
        describe("m", small(folder, context_prefix="token", **changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_context_above_the_models(tmp_path: Path, family: str) -> None:
    folder = tiny_models.make_model_folder(tmp_path, family)
    with pytest.raises(ConfigError, match=r"at most 128.*found 129"):
        describe("m", small(folder, context_tokens=129))
    assert describe("m", small(folder, context_tokens=128)).context_tokens == 128


def test_tokenizer_with_more_ids_than_the_model_warns(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path, vocab_size=300)
    assert "316 ids, the model 300" in describe("m", small(folder)).warnings[0]


def test_broken_files(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelLoadError, match="safetensors"):
        describe("m", small(folder))
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelLoadError, match="trust_remote_code is off"):
        describe("m", small(folder))


# --- the loaded model ---


def test_an_unknown_change_of_logits_is_refused() -> None:
    model = tiny_models.make_model("llama")
    check_head(model, VOCAB_SIZE)
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled
    with pytest.raises(ModelLoadError, match="transforms its logits"):
        check_head(model, VOCAB_SIZE)
