"""Tiny causal LMs and tokenizers for tests, made on the fly: no download, random weights, seeded.

`make_model_folder(tmp_path, "llama")` gives a folder that `miniplm_udf.scoring.models.resolve` takes: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json. The tokenizer is a byte-level BPE of 316 entries.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEPARATOR = "<|endoftext|>"
CHAT_TOKEN = "<|im_end|>"
# Of the models; the tokenizer finds no more than 316 entries in its text, as models often have rows to spare.
VOCAB_SIZE = 320
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "mamba")
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
        "granite": attention | {"logits_scaling": 3.0},
        "cohere": attention | {"logit_scale": 0.25},
    }
    return AutoConfig.for_model(family, **(sizes | extra.get(family, {}) | changes))


def make_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model with weights large enough that its predictions differ from the uniform by whole nats."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(make_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(6.0)
    return model.eval()


def make_model_folder(
    parent: Path,
    family: str = "llama",
    *,
    name: str = "model",
    seed: int = 0,
    eos_token: str = SEPARATOR,
    chat_template: str | None = None,
    **changes: Any,
) -> Path:
    """Writes a tiny model with its tokenizer and returns the folder."""
    folder = Path(parent) / name
    make_model(family, seed, **changes).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {"eos_token": eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return folder
