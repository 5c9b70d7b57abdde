"""Every fact of a .gguf file is carried into the converted folder, or refused by name; none is dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.gguf_models import gguf_folder
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.scoring.weights import sha256_of, weights_hash
from tests.support import tiny_models

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 8, "tie_word_embeddings": True, "num_hidden_layers": 7},
    # transformers takes 128, whatever the file says.
    "qwen3": {"head_dim": 128},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder: Path, model: Any = None, **arguments: Any) -> Path:
    path = folder / "tiny.gguf"
    tiny_models.write_gguf(path, model or tiny_models.make_model(), **arguments)
    return path


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 62)[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_computes_what_the_model_does(tmp_path: Path, family: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied} | CHANGES.get(family, {})
    model = tiny_models.make_model(family, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # all ones, or zeros, would hide a norm that is not carried
            weight.add_(0.1 * torch.rand_like(weight) if "norm" in name or "bias" in name else 0.0)
    found = load_causal_lm(gguf_folder(written(tmp_path, model)))
    assert torch.allclose(logits(found), logits(model), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type: yarn"),
        ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor: 4.0"),
        ({"llama.rope.scale_linear": 2.0}, "rope.scale_linear: 2.0"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor"),
        ({"llama.rope.dimension_count": 4}, "."),
        ({"llama.attention.sliding_window": 8}, r"sliding_window: 8.*its config has no such value"),
        ({"llama.logit_scale": 0.5}, "logit_scale: 0.5"),
        ({"llama.expert_count": 4}, "expert_count: 4"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"llama.attention.layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        ({"llama.attention.causal": False}, "attention.causal: False"),
        ({"llama.some.new.key": 7}, r"llama\.some\.new\.key: 7, which the conversion does not carry.*safetensors"),
        ({"llama.some.long.list": [0] * 1001}, "some.long.list: a list of 1001"),
        ({"general.type": "adapter"}, "general.type: adapter"),
        ({"split.count": 3, "split.no": 0}, r"part 1 of 3 of a split model.*--merge"),
        ({"split.count": 3, "split.no": 2}, r"part 3 of 3 of a split model"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"tokenizer\.ggml\.pre: deepseek-llm.*tokenizer\.json next to"),
        ({"tokenizer.ggml.pre": "default"}, r"tokenizer\.ggml\.pre: default"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix: True"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap: list"),
    ],
)
def test_facts_that_are_not_carried(tmp_path: Path, cache: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        gguf_folder(written(tmp_path, facts=facts))
    assert not [path for path in cache.glob("gguf/*") if path.is_dir()]


def test_facts_that_change_nothing(tmp_path: Path) -> None:
    facts = {
        "general.tags": ["a"],
        "quantize.imatrix.file": "x",
        "somebody.quantize_version": 2,
        "split.count": 0,
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.finetuned": False,
        "llama.attention.causal": True,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.eot_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    path = written(tmp_path, facts=facts)
    assert weights_hash(gguf_folder(path)) == sha256_of(path)[:32], "the revision of a plain file stays"


def test_tensors_that_are_missing_or_not_used(tmp_path: Path) -> None:
    path = written(tmp_path, tensors={"blk.1.ffn_up.weight": None})
    with pytest.raises(ModelLoadError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        gguf_folder(path)
    path = written(tmp_path, tensors={"blk.1.attn_q.bias": np.ones(32, np.float32)})
    with pytest.raises(ModelLoadError, match=r"1 tensors not used: blk\.1\.attn_q\.bias"):
        gguf_folder(path)
    path.write_bytes(written(tmp_path).read_bytes()[:-4096])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: expected a \.gguf file"):
        gguf_folder(path)


def test_an_architecture_without_a_test(tmp_path: Path) -> None:
    path = written(tmp_path, facts={"general.architecture": "llama4"})
    with pytest.raises(ModelLoadError, match=r"one of llama, .* found general\.architecture: llama4"):
        gguf_folder(path)


def test_a_head_width_that_transformers_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="another shape"):
        gguf_folder(written(tmp_path, tiny_models.make_model("qwen3")))


def llama3_factors(config: Any) -> np.ndarray:
    """The numbers by which transformers itself divides the frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    head_dim = config.hidden_size // config.num_attention_heads
    plain = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama_3s_rotary_factors_are_carried(tmp_path: Path) -> None:
    model = tiny_models.make_model("llama", hidden_size=64, rope_parameters=LLAMA3)
    factors = llama3_factors(model.config)
    assert len({float(factor) for factor in factors}) > 2, "short, middle and long waves"
    path = written(tmp_path, model, tensors={"rope_freqs.weight": factors})
    folder = gguf_folder(path)
    assert torch.allclose(logits(load_causal_lm(folder)), logits(model), atol=1e-4)
    assert weights_hash(folder) != sha256_of(path)[:32], "scores without the factors are another model's"
    path = written(tmp_path, model, tensors={"rope_freqs.weight": factors + np.linspace(0, 1, 8, dtype=np.float32)})
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight .*not Llama 3's formula"):
        gguf_folder(path)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_linear_scaling_of_positions_is_carried(tmp_path: Path, family: str) -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    layers = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    architecture = "gemma3" if family == "gemma3_text" else family
    changes = {"rope_parameters": layers if architecture == "gemma3" else linear} | CHANGES.get(family, {})
    model = tiny_models.make_model(family, **changes)
    facts = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 8.0}
    path = written(tmp_path, model, facts=facts)
    folder = gguf_folder(path)
    assert torch.allclose(logits(load_causal_lm(folder)), logits(model), atol=1e-4)
    assert weights_hash(folder) != sha256_of(path)[:32]


def test_words_of_llama_3_are_taken_whole(tmp_path: Path) -> None:
    folder = gguf_folder(written(tmp_path, facts={"tokenizer.ggml.pre": "llama-bpe"}))
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["ignore_merges"] is True


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]


@pytest.mark.parametrize(
    ("stated", "works"), [({}, True), ({"tokenizer.ggml.add_space_prefix": True}, True), (None, False)]
)
def test_a_space_in_front_of_a_text(tmp_path: Path, stated: dict[str, Any] | None, works: bool) -> None:
    """llama.cpp's default is a space; transformers takes it for this family, whatever the file says."""
    facts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": SENTENCEPIECE,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(SENTENCEPIECE))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.merges": None,
    } | ({"tokenizer.ggml.add_space_prefix": False} if stated is None else stated)
    path = written(tmp_path, tiny_models.make_model(vocab_size=len(SENTENCEPIECE)), facts=facts)
    if works:
        assert load_tokenizer(gguf_folder(path)).encode("ab", add_special_tokens=False).tokens == ["▁a", "b"]
    else:
        with pytest.raises(ModelLoadError, match="add_space_prefix: False"):
            gguf_folder(path)


def test_a_tokenizer_next_to_the_file_counts(tmp_path: Path) -> None:
    path = written(tmp_path, facts={"tokenizer.ggml.pre": "deepseek-llm"})
    tiny_models.make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(gguf_folder(path)).encode("hello", add_special_tokens=False).tokens
    tiny_models.make_tokenizer((tiny_models.SEPARATOR,)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ModelLoadError, match=r"tokenizer\.json: expected the vocabulary of tiny\.gguf, found .* as token 2"
    ):
        gguf_folder(path)


def test_a_folder_of_an_older_conversion_is_not_taken(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path)
    old = cache / "gguf" / f"{sha256_of(path)}-v1"
    old.mkdir(parents=True)
    assert gguf_folder(path) != old
    assert describe("m", ModelConfig(path=str(path), context_tokens=64, window_overlap_tokens=8)).n_parameters > 0
