"""Tiny causal LMs and tokenizers for tests, made on the fly: no download, random weights, seeded.

`make_model_folder(tmp_path, "llama")` gives a folder that `miniplm_udf.scoring.models.resolve` takes: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json. The tokenizer is a byte-level BPE of 316 entries.
`write_gguf` writes a Llama of these as a .gguf file, as llama.cpp's converter would. `make_scorer` loads a folder the
way a job does. Needs torch, transformers and what they install, so that tests/gpu can use it (`write_gguf`: gguf, too).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEPARATOR = "<|endoftext|>"
CHAT_TOKEN = "<|im_end|>"
# Of the models; the tokenizer finds no more than 316 entries in its text, as models often have rows to spare.
VOCAB_SIZE = 320
# Those that the project names; then those with something of their own: logits scaled or divided, a head with a bias,
# experts, post-norms, learned positions with an offset, ALiBi, another state-space model.
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "mamba")
OTHER_FAMILIES = ("granite", "cohere", "phi", "mixtral", "qwen3", "gemma3_text", "olmo2", "opt", "bloom", "mamba2")
_TEXT = ["the quick brown fox jumps over the lazy dog. ", "hello world, this is a test of the tokenizer!\n\n", "a  b"]


def make_tokenizer(special_tokens: tuple[str, ...] = (SEPARATOR, CHAT_TOKEN)) -> Tokenizer:
    """A byte-level BPE with GPT-2's split; every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    return tokenizer


def make_config(family: str, **changes: Any) -> Any:
    """A transformers config of about 20 thousand parameters with 2 layers."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    attention = {
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    extra: dict[str, dict[str, Any]] = {
        "llama": attention,
        "qwen2": attention,
        "gemma2": attention | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8},
        "gpt2": {"n_positions": 128, "num_attention_heads": 4},
        "mamba": {"state_size": 4, "expand": 2},
        "granite": attention | {"logits_scaling": 0.2},
        "cohere": attention | {"logit_scale": 0.25},
        "phi": attention | {"num_key_value_heads": 4},
        "mixtral": attention | {"num_local_experts": 4},
        "qwen3": attention | {"head_dim": 8},
        "gemma3_text": attention | {"head_dim": 8, "sliding_window": 8},
        "olmo2": attention,
        "opt": {"ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
        "bloom": {"n_head": 4},
        "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    }
    return AutoConfig.for_model(family, **(sizes | extra.get(family, {}) | changes))


def make_model(family: str = "llama", seed: int = 0, factor: float | None = None, **changes: Any) -> Any:
    """A model with weights large enough that its predictions differ from the uniform by whole nats.

    Args:
        family: one of FAMILIES or OTHER_FAMILIES.
        seed: of the weights.
        factor: on transformers' own first weights; None takes one for the family.
        **changes: keys of its config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(make_config(family, **changes))
    # Mamba's differ as much with less, and with more its rounding errors grow into the tolerances.
    factor = factor or (3.0 if "mamba" in family else 6.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(factor)
    return model.eval()


def make_model_folder(
    parent: Path,
    family: str = "llama",
    *,
    name: str = "model",
    seed: int = 0,
    eos_token: str = SEPARATOR,
    chat_template: str | None = None,
    factor: float | None = None,
    **changes: Any,
) -> Path:
    """Writes a tiny model with its tokenizer and returns the folder."""
    folder = Path(parent) / name
    make_model(family, seed, factor, **changes).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {"eos_token": eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return folder


def make_scorer(
    path: Path | str,
    tokens_per_batch: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool | None = None,
    **config: Any,
) -> Any:
    """The scorer of a model folder or .gguf file, described and loaded as a job does it.

    Args:
        path: where the model is.
        tokens_per_batch: the scorer's budget.
        device: where it runs.
        dtype: of the forward pass.
        compiled: as the scorer takes it; None lets the device decide.
        **config: further keys of `ModelConfig`; windows are 24 tokens long and share 6 unless told.
    """
    from miniplm_udf.config import ModelConfig
    from miniplm_udf.scoring.models import describe, load_model, resolve
    from miniplm_udf.scoring.scorer import Scorer
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    model_config = ModelConfig(path=str(path), **({"context_tokens": 24, "window_overlap_tokens": 6} | config))
    description = describe("m", model_config, dtype=dtype)
    model = load_model(model_config, description, device)
    return Scorer(model, load_tokenizer(resolve(model_config)), description, tokens_per_batch, device, compiled)


def decoder_of(scorer: Any) -> Any:
    """The module that a scorer's forward passes go through: a place for a test's hooks."""
    return scorer._head.decoder


def write_gguf(path: Path, model: Any, *, quantised: bool = False) -> None:
    """Writes a tiny Llama and its tokenizer as a .gguf file.

    Args:
        path: the file; its name ends in .gguf.
        model: of `make_model("llama")`.
        quantised: weight matrices in Q8_0, else float32.
    """
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(7 if quantised else 0)
    _add_tokenizer(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        weight = _as_llama_cpp(name, tensor.float().numpy(), config)
        if quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, vocab_size: int) -> None:
    plain = json.loads(make_tokenizer().to_str())
    tokens = sorted(plain["model"]["vocab"], key=plain["model"]["vocab"].get)
    special = [token["content"] for token in plain["added_tokens"]]
    spare = [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + spare)
    # 1 is an ordinary token, 3 one of control, 5 one that is not used.
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [5] * len(spare))
    writer.add_token_merges([" ".join(pair) for pair in plain["model"]["merges"]])
    writer.add_eos_token_id(0)


def _gguf_name(name: str) -> str:
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


def _as_llama_cpp(name: str, weight: Any, config: Any) -> Any:
    """The rows of queries and keys in llama.cpp's order of rotary pairs: neighbours, not halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, n_heads in heads.items():
        if part in name:
            halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight
