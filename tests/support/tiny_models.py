"""Tiny causal LMs and tokenizers for tests, made on the fly: no download, random weights, seeded.

`make_model_folder(tmp_path, "llama")` gives a folder that `scoring.model_files.model_folder` takes: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json. The tokenizer is a byte-level BPE of 316 entries.
`write_gguf` writes some of these as a .gguf file, as llama.cpp's converter would. `make_scorer` loads a folder the
way a job does. Needs torch, transformers and what they install, so that tests/gpu can use it (`write_gguf`: gguf, too).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEPARATOR = "<|endoftext|>"
CHAT_TOKEN = "<|im_end|>"
# Rows of the models' embeddings. The tokenizer has at most 316 entries; models often have spare rows.
VOCAB_SIZE = 320
# Families that the project names, then families with a peculiarity: logits scaled or divided, a head with a bias,
# experts, post-norms, learned positions with an offset, ALiBi, another state-space model. Where the name is not
# transformers' `model_type`, _MODEL_TYPES has it.
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "mamba")
OTHER_FAMILIES = (
    "granite", "cohere", "phi", "mixtral", "qwen3", "gemma3_text", "olmo2", "opt", "bloom", "mamba2",
    "mistral", "phi3", "gpt_neox", "smollm3", "olmo3", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "falcon_h1",
    "bamba", "llama3", "smollm", "phi4", "phi4_mini", "falcon_mamba",
)  # fmt: skip
_MODEL_TYPES = {"llama3": "llama", "smollm": "llama", "phi4": "phi3", "phi4_mini": "phi3"}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * n for n in range(6)], "long_factor": [1.5 + 0.5 * n for n in range(6)],
}  # fmt: skip
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
    experts = {"num_experts_per_tok": 2}
    latent = {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    state_space = {
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
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
        "mistral": attention | {"sliding_window": 8},
        "phi3": attention,
        "gpt_neox": attention,
        "smollm3": attention,
        "olmo3": attention | {"sliding_window": 8},
        "qwen3_moe": attention | experts | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
        "olmoe": attention | experts | {"num_experts": 4},
        "gpt_oss": attention | experts | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
        # Keys and values are computed from a few numbers per token; the first layer has no experts.
        "deepseek_v3": attention | experts | latent,
        # Attention and a state space side by side, or in turn.
        "falcon_h1": attention | state_space | {"head_dim": 8, "mamba_d_ssm": 32},
        "bamba": attention | state_space | {"attn_layer_indices": [1], "mamba_n_heads": 8},
        # "llama" is Llama 2. Llama 3 stretches the slow frequencies of its rotary embedding, here from 16 tokens on.
        "llama3": attention | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False},
        # The number of heads is no power of two.
        "smollm": attention
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "tie_word_embeddings": True},
        "phi4": attention | {"sliding_window": None},
        # Rotates three quarters of a head; has other frequencies in batches of more than 64 tokens.
        "phi4_mini": attention
        | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64, "hidden_size": 64},
        "falcon_mamba": {"state_size": 4, "expand": 2},
    }
    return AutoConfig.for_model(_MODEL_TYPES.get(family, family), **(sizes | extra.get(family, {}) | changes))


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
    tokens_per_batch: int | None = 64,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool | None = None,
    **config: Any,
) -> Any:
    """The scorer of a model folder or .gguf file, described and loaded as a job does it.

    Args:
        path: where the model is.
        tokens_per_batch: the scorer's budget; None searches one on a GPU.
        device: where it runs.
        dtype: of the forward pass.
        compiled: as the scorer takes it; None lets the device decide.
        **config: further keys of `ModelConfig`; windows are 24 tokens long and share 6 unless told.
    """
    from miniplm_udf.config.sections import ModelConfig
    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.models import describe, load_model
    from miniplm_udf.scoring.scorer import Scorer
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    model_config = ModelConfig(path=str(path), **({"context_tokens": 24, "window_overlap_tokens": 6} | config))
    description = describe("m", model_config, dtype=dtype)
    model = load_model(model_config, description, device)
    return Scorer(model, load_tokenizer(model_folder(model_config)), description, tokens_per_batch, device, compiled)


def decoder_of(scorer: Any) -> Any:
    """The module that a scorer's forward passes go through: a place for a test's hooks."""
    return scorer._head.decoder


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantised: bool = False,
    facts: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """Writes a tiny model and its tokenizer as a .gguf file, as llama.cpp's converter does.

    Args:
        path: the file; its name ends in .gguf.
        model: of `make_model`: a Llama, Qwen 2 or 3, Gemma 2 or 3.
        quantised: weight matrices in Q8_0, else float32.
        facts: more metadata, by key; they replace the model's own, None leaves one out.
        tensors: more tensors (numpy arrays) by llama.cpp's name; None in place of one leaves it out.
    """
    import gguf
    import numpy as np

    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    stated = _facts(config, architecture, quantised) | _tokenizer_facts(config.vocab_size) | (facts or {})
    for key, value in stated.items():
        if value is not None:
            _add_fact(writer, key, value)
    weights = {
        _gguf_name(name, architecture, config.num_hidden_layers): _as_llama_cpp(name, tensor.float().numpy(), config)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    for name, weight in (weights | (tensors or {})).items():
        if weight is not None and quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        elif weight is not None:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _facts(config: Any, architecture: str, quantised: bool) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a model."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    facts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture == "llama":
        facts["rope.dimension_count"] = head_dim
    else:
        facts |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture.startswith("gemma"):
        facts["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        facts["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        facts["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return {f"{architecture}.{key}": value for key, value in facts.items()} | {"general.file_type": 7 * quantised}


def _add_fact(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _tokenizer_facts(vocab_size: int) -> dict[str, Any]:
    plain = json.loads(make_tokenizer().to_str())
    tokens = sorted(plain["model"]["vocab"], key=plain["model"]["vocab"].get)
    special = [token["content"] for token in plain["added_tokens"]]
    spare = [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + spare,
        # 1 is an ordinary token, 3 one of control, 5 one that is not used.
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens] + [5] * len(spare),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in plain["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def _gguf_name(name: str, architecture: str, n_layers: int) -> str:
    import gguf

    number = next(key for key, spelling in gguf.MODEL_ARCH_NAMES.items() if spelling == architecture)
    renamed = gguf.get_tensor_name_map(number, n_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert renamed is not None
    return renamed


def _as_llama_cpp(name: str, weight: Any, config: Any) -> Any:
    """A weight as llama.cpp keeps it.

    Llama: the rows of queries and keys in the order of rotary pairs, neighbours, not halves. Gemma: norms plus 1.
    """
    if config.model_type.startswith("gemma") and "norm" in name:
        return weight + 1
    if config.model_type != "llama":
        return weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, n_heads in heads.items():
        if part in name:
            halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


BOS = "<bos>"
BOS_ID = 2


def make_bos_folder(parent: Path, family: str, stated_by: str | None, **changes: Any) -> Path:
    """A tiny model whose vocabulary has a BOS, which its files may say stands in front of texts.

    Args:
        parent: the folder is made in it.
        family: of `make_model_folder`.
        stated_by: "add_bos_token" (as Gemma's tokenizer_config.json does), "post_processor" (as Llama 3's
            tokenizer.json does), or None (as Qwen's files do).
        **changes: of `make_model_folder`.
    """
    folder = make_model_folder(parent, family, **changes)
    tokenizer = make_tokenizer((SEPARATOR, CHAT_TOKEN, BOS))
    if stated_by == "post_processor":
        template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    stated = {"add_bos_token": True} if stated_by == "add_bos_token" else {}
    plain = json.loads(path.read_text(encoding="utf-8")) | {"bos_token": BOS} | stated
    path.write_text(json.dumps(plain), encoding="utf-8")
    return folder
