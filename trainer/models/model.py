"""Builds a causal LM with new weights from an architecture dict, for any config class of `AutoModelForCausalLM`.

Input: `AutoConfig` keywords with `model_type`. Output: a torch module in fp32 on the CPU. Owns the checks (unknown
model type, unknown key, vocabulary or context too small) and the defaults that come from the data: vocabulary and
special tokens from the tokenizer, longest input from the packed sequences. Chooses the implementation of Mamba's scan.
Reads and writes no file.
"""

import difflib
import importlib.util
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json

# Keys that transformers 5 accepts and moves into `rope_parameters` of the config.
_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# Packages with the CUDA kernels of Mamba, by the names of their modules.
_KERNELS = ("mamba_ssm", "causal_conv1d")


def _config_class(where: str, model_type: Any) -> type[PretrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_types = list(CONFIG_MAPPING.keys())
    if model_type not in model_types:
        close = difflib.get_close_matches(str(model_type), model_types, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else " (llama, qwen2, gpt2, mamba, ...)"
        raise ConfigError(f"{where}.model_type: expected a model type of transformers, found {model_type!r}{hint}")
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return config_class


def _check_keys(where: str, config_class: type[PretrainedConfig], keys: list[str]) -> None:
    names = set(inspect.signature(config_class.__init__).parameters) - {
        "self",
        "kwargs",
    }
    names |= set(config_class.attribute_map)
    if hasattr(config_class(), "rope_parameters"):
        names |= _ROPE_KEYS
    for key in keys:
        if key not in names:
            close = difflib.get_close_matches(key, sorted(names), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: {config_class.__name__} has no key {key!r}{hint}")


def model_config(
    architecture: Json,
    *,
    where: str,
    vocab_size: int,
    separator_id: int,
    max_positions: int,
) -> PretrainedConfig:
    """Makes the transformers config of a model to train.

    Args:
        architecture: `AutoConfig` keywords, with `model_type`.
        where: config key of the architecture, for messages.
        vocab_size: number of ids of the tokenizer; a larger `architecture.vocab_size` (a multiple of 64, for example)
            is kept.
        separator_id: id of the document separator, which becomes the BOS and EOS token.
        max_positions: longest input of the model, in tokens; the default of `max_position_embeddings`.

    Raises:
        ConfigError: `model_type` or a key is unknown, a value has the wrong type, or the vocabulary or context is too
            small.
    """
    keywords = dict(architecture)
    if "model_type" not in keywords:
        raise ConfigError(f"{where}.model_type: expected a model type of transformers (llama, qwen2, ...), found none")
    config_class = _config_class(where, keywords.pop("model_type"))
    _check_keys(where, config_class, list(keywords))
    keywords.setdefault("vocab_size", vocab_size)
    keywords.setdefault("bos_token_id", separator_id)
    keywords.setdefault("eos_token_id", separator_id)
    # A padding id would keep its row of the embedding at zero, and padding never counts in the loss.
    keywords.setdefault("pad_token_id", None)
    positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if hasattr(config_class(), positions) and not {
        positions,
        "max_position_embeddings",
    } & set(keywords):
        keywords[positions] = max_positions
    try:
        config = config_class(**keywords)
    except Exception as error:  # config classes raise many error types, also huggingface_hub's own
        raise ConfigError(f"{where}: {config_class.__name__} refuses these values: {error}") from error
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"{where}.vocab_size: expected at least {vocab_size}, the tokenizer's size, found {config.vocab_size}; "
            "raise it, remove the key to take the tokenizer's size, or choose the tokenizer that the model was made for"
        )
    if getattr(config, "max_position_embeddings", max_positions) < max_positions:
        raise ConfigError(
            f"{where}.max_position_embeddings: expected at least {max_positions}, the longest input (pack."
            f"sequence_length or the model's context_tokens), found {config.max_position_embeddings}; raise it, remove "
            "the key to take that length, or lower pack.sequence_length"
        )
    return config


def choose_scan(config: PretrainedConfig, architecture: Json, device: torch.device, *, where: str) -> None:
    """Chooses a parallel scan for a Mamba, in place: CUDA kernels where they can run, else the package mambapy.

    transformers takes the kernels by itself, and otherwise a loop over the tokens, whose time grows with the square of
    their number (docs/training.md). Other model types stay as they are, and so does `use_mambapy: false`.

    Args:
        config: from `model_config`.
        architecture: the keywords that the config was made from.
        device: where the model will train.
        where: config key of the architecture, for the message.

    Raises:
        ConfigError: only the loop over the tokens can run here.
    """
    if not hasattr(config, "use_mambapy") or architecture.get("use_mambapy") is False:
        return
    if device.type == "cuda" and all(map(_is_installed, _KERNELS)):
        return
    if not _is_installed("mambapy"):
        raise ConfigError(
            f"{where}: expected a parallel scan for model type {config.model_type}, found only transformers' loop over "
            "the tokens, which is too slow to train with; install mambapy (`pip install mambapy`; the extra `train` "
            "has it), or on a GPU mamba-ssm and causal-conv1d; use_mambapy: false in the architecture takes the loop"
        )
    config.use_mambapy = True


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def build_model(config: PretrainedConfig, *, where: str, seed: int) -> PreTrainedModel:
    """Builds a model with new fp32 weights, which depend only on `config` and `seed`.

    Args:
        config: from `model_config`.
        where: config key of the architecture, for messages.
        seed: seed of the weights.

    Raises:
        ConfigError: the model type has no causal LM, or its sizes do not fit together.
    """
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        first_line = str(error).split("\n")[0]
        raise ConfigError(f"{where}: no causal LM can be built from these values: {first_line}") from error
    return model


def n_parameters(model: torch.nn.Module) -> int:
    """Counts the weights of a model; tied weights count once.

    Args:
        model: any module.
    """
    return sum(parameter.numel() for parameter in model.parameters())
