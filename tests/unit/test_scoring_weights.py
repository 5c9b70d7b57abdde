"""A model is what its files say, whole: no random weight, no tensor left over, and no file that is not the model's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.weights import n_parameters, weight_bytes, weight_files, weights_hash
from tests.support import tiny_models

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))


def edited(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """The folder, with other tensors and other keys of its config."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def plus(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


def same(tensors: Tensors) -> Tensors:
    return tensors


# --- every weight from the files, every tensor used ---


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (prefixed("_orig_mod."), {}, r"21 missing \(lm_head.*compiled or a wrapped model: strip '_orig_mod\.'"),
        (prefixed("module."), {}, r"21 unexpected \(module\.lm_head.*strip 'module\.'"),
        (prefixed("base_model.model."), {}, r"adapter's \(LoRA\)"),
        (without("layers.1.mlp.up_proj"), {}, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (without("model.norm"), {}, r"1 missing \(model\.norm\.weight\)"),
        (without("lm_head"), {}, r"no output layer.*tie_word_embeddings: false"),
        (same, {"num_hidden_layers": 3}, "config.json says 3 layers, the files hold 2"),
        (same, {"num_hidden_layers": 1}, "config.json says 1 layers, the files hold 2"),
        (same, {"intermediate_size": 40}, r"6 of another shape .*: \[32, 48\], the config says \[32, 40\]"),
        (same, {"tie_word_embeddings": True}, "tie_word_embeddings: true.*differs"),
        (plus("score.weight", 2, 32), {}, r"1 unexpected \(score\.weight\).*another task"),
        (plus("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 32), {}, "adapter"),
    ],
)
def test_weights_that_are_not_the_configs(
    tmp_path: Path, change: Callable[[Tensors], Tensors], config: dict[str, Any], message: str
) -> None:
    folder = edited(tiny_models.make_model_folder(tmp_path), change, **config)
    model = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=8)
    with pytest.raises(ModelLoadError, match=message):
        load_model(model, describe("m", model))


def test_a_class_that_never_ties_keeps_its_own_output_layer(tmp_path: Path) -> None:
    """The config of BigBird-Pegasus says tied by default, and transformers ties nothing."""
    sizes = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_position_embeddings": 128}
    config = AutoConfig.for_model("bigbird_pegasus", vocab_size=320, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert config.tie_word_embeddings
    model.save_pretrained(tmp_path / "model")
    head = load_causal_lm(tmp_path / "model").get_output_embeddings()
    assert torch.equal(head.weight, model.get_output_embeddings().weight)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = edited(
        tiny_models.make_model_folder(tmp_path, "mixtral"), without("layers.0.block_sparse_moe.experts.3.w1")
    )
    with pytest.raises(ModelLoadError, match=r"joined into one \(experts\) are missing"):
        load_causal_lm(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_without_their_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {name: tensor.to(dtype) if "up_proj" in name else tensor for name, tensor in tensors.items()}

    with pytest.raises(ModelLoadError, match=r"2 weights are stored as .*no quantization_config"):
        load_causal_lm(edited(tiny_models.make_model_folder(tmp_path), change))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", plus("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
        ("gpt2", plus("transformer.h.0.attn.bias", 1, 1, 128, 128)),
        ("gpt2", lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}),
    ],
)
def test_leftovers_and_spellings_that_are_accounted_for(
    tmp_path: Path, family: str, change: Callable[[Tensors], Tensors]
) -> None:
    folder = tiny_models.make_model_folder(tmp_path, family)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = load_causal_lm(edited(folder, change)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", tiny_models.FAMILIES + tiny_models.OTHER_FAMILIES)
def test_families_are_whole(tmp_path: Path, family: str) -> None:
    load_causal_lm(tiny_models.make_model_folder(tmp_path, family))


@pytest.mark.parametrize("hidden", ["model.norm.weight", "lm_head.weight"])
def test_a_report_that_says_nothing_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", {hidden})
    folder = edited(tiny_models.make_model_folder(tmp_path), without(hidden))
    with pytest.raises(ModelLoadError, match=rf"1 weights of the model \({hidden}\) are in none of the files"):
        load_causal_lm(folder)


# --- which files are the model ---


def sharded(parent: Path) -> Path:
    """A tiny model in two shards."""
    folder = tiny_models.make_model_folder(parent)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[number % 2][name] = tensor
    for file, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_only_what_the_index_names_counts(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    plain = load_causal_lm(folder)
    before = (n_parameters(folder), weights_hash(folder))
    assert before[0] == sum(parameter.numel() for parameter in plain.parameters())
    save_file(plain.state_dict(), folder / "consolidated.safetensors")
    assert [file.name for file in weight_files(folder)] == list(SHARDS)
    assert (n_parameters(folder), weights_hash(folder)) == before


def test_a_file_besides_the_single_one_does_not_count(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    before = (n_parameters(folder), weights_hash(folder))
    save_file({"other": torch.ones(5)}, folder / "consolidated.safetensors")
    assert (n_parameters(folder), weights_hash(folder)) == before


def test_the_hash_of_ordinary_models_stays(tmp_path: Path) -> None:
    """Golden values: another hash is another revision, and would score every corpus again."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model": torch.full((2, 3), 1.0)}, tmp_path / "model.safetensors")
    assert weights_hash(tmp_path) == "b64f8bdc55818c05a8746576ab51a531"
    (tmp_path / "modeling_own.py").write_text("a = 1\n")
    assert weights_hash(tmp_path) == "7b93356ebbe042b29375c558e10e105d"
    (tmp_path / "modeling_own.py").unlink()
    (tmp_path / "model.safetensors").unlink()
    for number, file in enumerate(SHARDS, start=1):
        save_file({f"w{number}": torch.full((2, 3), float(number))}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w1": SHARDS[0], "w2": SHARDS[1]}}))
    assert (weights_hash(tmp_path), n_parameters(tmp_path)) == ("e9c9a10ecc639078680c7ca0b4cdf59a", 12)


def test_shards_that_are_absent_cut_off_or_of_two_models(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    whole = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(whole[:-8])
    with pytest.raises(ModelLoadError, match=rf"{SHARDS[1]}: expected [\d,]+ bytes, found [\d,]+: the file is cut off"):
        n_parameters(folder)
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[0]).read_bytes())
    with pytest.raises(ModelLoadError, match="of two saved models"):
        n_parameters(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ModelLoadError, match=rf"of which 1 are not there: {SHARDS[1]}"):
        model_folder(ModelConfig(path=str(folder)))


def test_the_memory_of_weights_counts_quantised_numbers_as_they_are_stored(tmp_path: Path) -> None:
    stored = {
        "w": torch.zeros(4, 5), "half": torch.zeros(3, dtype=torch.bfloat16),
        "packed": torch.zeros(2, dtype=torch.int32),
        "eight": torch.zeros(7, dtype=torch.float8_e4m3fn), "bytes": torch.zeros(9, dtype=torch.uint8),
    }  # fmt: skip
    save_file(stored, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path, 2) == 2 * 20 + 2 * 3 + 4 * 2 + 7 + 9
    assert weight_bytes(tmp_path, 4) == 4 * 20 + 4 * 3 + 4 * 2 + 7 + 9
    folder = tiny_models.make_model_folder(tmp_path)
    assert weight_bytes(folder, 4) == sum(weight.nbytes for weight in load_causal_lm(folder).parameters())


def test_files_that_cannot_be_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = (folder / INDEX).read_text()
    (folder / "model.safetensors").write_bytes((folder / SHARDS[0]).read_bytes())
    with pytest.raises(ModelLoadError, match=r"holds both model\.safetensors and .*index"):
        weight_files(folder)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()
    with pytest.raises(ModelLoadError, match="unclear which of them are the model"):
        weight_files(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ModelLoadError, match=rf"{SHARDS[0]}; rename it to model\.safetensors"):
        weight_files(folder)
    (folder / INDEX).write_text(index.replace(SHARDS[0], "../" + SHARDS[0]))
    with pytest.raises(ModelLoadError, match="in the same folder"):
        weight_files(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(ModelLoadError, match="weight_map"):
        weight_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="merge_and_unload"):
        weight_files(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"expected weights as \*\.safetensors, found pytorch_model\.bin"):
        model_folder(ModelConfig(path=str(folder)))
