"""The facts that a .gguf file states, and the check that the model made from the file has all of them.

Owns the table of metadata keys (llama.cpp's names) with the attribute of a transformers config that each must equal.
A key in neither table is refused by name, because transformers silently drops what it does not know. Input: a local
.gguf file; the config and torch model that were made from it. Output: nothing, or a ModelLoadError with the key, its
value and the remedy. Executor side; pure. Reads no weights except the few numbers of `rope_freqs.weight`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.storage import Json

# Architectures whose conversion a test compares with the original weights; others might permute a matrix unnoticed.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
# Longer lists are not read: a list with a value for each layer is shorter, a vocabulary is longer.
_LONGEST_LIST = 1000
ROPE_FACTORS = "rope_freqs.weight"
_REMEDY = "give the model as a folder of safetensors instead"

# Keys of an architecture -> attributes of the config, of which the first that exists counts.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# Facts of an architecture that change no score, or only together with another fact that is checked.
_HARMLESS = {
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


class GgufFile(NamedTuple):
    """The facts of a .gguf file.

    Attributes:
        path: the file.
        metadata: its values by key; a long list (a vocabulary, its merges) is replaced by a text with its length.
        tensors: number of elements of each tensor, by name.
        rope_factors: divisors of the rotary frequencies; None if the file has none.
    """

    path: Path
    metadata: Json
    tensors: dict[str, int]
    rope_factors: list[float] | None

    @property
    def architecture(self) -> str:
        """Name of the architecture that the file states, for example `llama`; "None" if it states none."""
        return str(self.metadata.get("general.architecture"))

    def fact(self, key: str) -> Any:
        """Returns the value of a key of the file's architecture.

        Args:
            key: the key without the name of the architecture, for example `context_length`.

        Returns:
            The value; None if the file does not state it.
        """
        return self.metadata.get(f"{self.architecture}.{key}")


def read_file(path: Path) -> GgufFile:
    """Reads the metadata and the list of tensors of a .gguf file.

    Args:
        path: the file.

    Returns:
        Its facts, without the elements of the tensors, except the divisors of the rotary frequencies.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    metadata = {
        key: field.contents() if len(field.data) <= _LONGEST_LIST else f"a list of {len(field.data)}"
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    factors = next((tensor.data.tolist() for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    return GgufFile(path, metadata, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}, factors)


def refuse_what_is_no_model(file: GgufFile) -> None:
    """Refuses a part of a split model, an adapter, a projector and an architecture that no test covers.

    Args:
        file: the facts of the file.

    Raises:
        ModelLoadError: the file is no whole model of a tested architecture.
    """
    parts = file.metadata.get("split.count", 0)
    if parts > 1:
        number = file.metadata.get("split.no", 0) + 1
        raise ModelLoadError(
            f"{file.path}: is part {number} of {parts} of a split model (split.count); join the parts first: "
            f"llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelLoadError(f"{file.path}: expected a model, found general.type: {kind}; name the model's own file")
    if file.architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: expected a GGUF of one of {', '.join(ARCHITECTURES)}, whose conversion is tested, found "
            f"general.architecture: {file.architecture}; {_REMEDY}"
        )


# --- the config ---


def check_config(file: GgufFile, config: Any) -> None:
    """Refuses a file that states a fact which the config made from it does not carry.

    Args:
        file: the .gguf file.
        config: the config of transformers, read back from the converted folder.

    Raises:
        ModelLoadError: a fact is missing or differs; the message has the key and both values.
    """
    text = config.get_text_config()
    prefix = f"{file.architecture}."
    stated = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    for key, value in (_implied(file, text) | stated).items():
        if key in _HARMLESS:
            continue
        compute = _COMPUTED.get(key)
        config_value = compute(text) if compute else _attribute(text, key)
        if not _equal(_plain(key, value, text), config_value):
            raise ModelLoadError(
                f"{file.path}: states {prefix}{key}: {value}, which the conversion does not carry "
                f"({_shown(config_value)}); {_REMEDY}"
            )


def _shown(config_value: Any) -> str:
    return "its config has no such value" if config_value is None else f"its config says {config_value}"


def _implied(file: GgufFile, config: Any) -> Json:
    """The values that llama.cpp assumes for facts that the file does not state."""
    width, heads = file.fact("embedding_length"), file.fact("attention.head_count")
    head = file.fact("attention.key_length") or width // heads
    implied = {
        "attention.head_count_kv": heads,
        "attention.key_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": 10000.0,
    }
    if not file.architecture.startswith("gemma"):
        implied["attention.sliding_window"] = 0  # none
    if hasattr(config, "query_pre_attn_scalar"):
        implied["attention.scale"] = _gemma_scalar(file) ** -0.5
    if _rope(config, "sliding_attention") is not _rope(config):
        implied["rope.freq_base_swa"] = 10000.0
    return implied


def _attribute(config: Any, key: str) -> Any:
    return next((getattr(config, name) for name in _ATTRIBUTES.get(key, ()) if hasattr(config, name)), None)


def _rope(config: Any, layers: str = "full_attention") -> Json:
    """The rotary parameters of a kind of layer."""
    parameters: Json = getattr(config, "rope_parameters", None) or {}
    inner = parameters.get(layers)
    return dict(inner) if isinstance(inner, dict) else parameters


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_dim(config: Any) -> int:
    share = _rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(_head_dim(config) * share)


def _sliding_layers(config: Any) -> list[bool]:
    return [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]


def _scaling_type(config: Any) -> str:
    kind = _rope(config).get("rope_type", "default")
    return "none" if kind in ("default", "llama3") else str(kind)


def _scaling_factor(config: Any) -> float:
    return float(_rope(config)["factor"]) if _scaling_type(config) == "linear" else 1.0


_COMPUTED: dict[str, Callable[[Any], Any]] = {
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "attention.scale": lambda config: getattr(config, "query_pre_attn_scalar", _head_dim(config)) ** -0.5,
    "attention.causal": lambda config: True,
    "attention.sliding_window_pattern": _sliding_layers,
    "rope.dimension_count": _rotary_dim,
    "rope.freq_base": lambda config: _rope(config).get("rope_theta"),
    "rope.freq_base_swa": lambda config: _rope(config, "sliding_attention").get("rope_theta"),
    "rope.scaling.type": _scaling_type,
    "rope.scaling.factor": _scaling_factor,
    "rope.scale_linear": _scaling_factor,
    "rope.scaling.attn_factor": lambda config: 1.0,
}


def _plain(key: str, value: Any, config: Any) -> Any:
    """A value of the file in the form that the config has."""
    if key == "attention.sliding_window_pattern" and isinstance(value, int):
        return [(layer + 1) % value != 0 for layer in range(config.num_hidden_layers)]
    if key == "rope.scaling.type" and value == "linear" and _scaling_type(config) == "none":
        return "none"  # the factor decides: 1 is no scaling
    return value


def _equal(stated: Any, config_value: Any) -> bool:
    if isinstance(stated, list):
        # A number for each layer; the configs of transformers have one number for all.
        return stated == config_value or (bool(stated) and all(_equal(value, config_value) for value in stated))
    if isinstance(stated, int | float) and not isinstance(stated, bool):
        if config_value is None:
            return stated == 0  # switched off
        return isinstance(config_value, int | float) and math.isclose(stated, config_value, rel_tol=1e-6)
    return bool(stated == config_value) or (config_value is None and stated is False)


# --- facts that transformers drops and this module adds to the config ---


def carried(file: GgufFile, config: Json) -> Json:
    """The keys of the config that the conversion by transformers leaves at their defaults, with the file's values.

    Args:
        file: the .gguf file.
        config: the config that transformers made from it, as plain data.

    Returns:
        Values by key of config.json.

    Raises:
        ModelLoadError: the factors of the rotary frequencies follow no formula that a config can name.
    """
    changes: Json = {}
    rope = _llama3_rope(file, config) or _linear_rope(file, config)
    if rope is not None:
        changes["rope_parameters"] = rope
    if "query_pre_attn_scalar" in config and config["query_pre_attn_scalar"] != _gemma_scalar(file):
        changes["query_pre_attn_scalar"] = _gemma_scalar(file)
    return changes


def _gemma_scalar(file: GgufFile) -> int:
    """The number whose root divides a Gemma's attention. llama.cpp tells the 27B models by their number of layers."""
    width, heads = int(file.fact("embedding_length")), int(file.fact("attention.head_count"))
    largest = {"gemma2": 46, "gemma3": 62}.get(file.architecture) == file.fact("block_count")
    return width // heads if largest else int(file.fact("attention.key_length") or width // heads)


def _llama3_rope(file: GgufFile, config: Json) -> Json | None:
    """The rotary parameters that give the factors of `rope_freqs.weight`; None if these change nothing.

    The tensor divides the frequency of each pair of dimensions. It must equal Llama 3's formula (low and high frequency
    factors 1 and 4) for some factor and original context, to 1e-4.
    """
    if file.rope_factors is None or all(factor == 1.0 for factor in file.rope_factors):
        return None
    theta = float((config.get("rope_parameters") or {}).get("rope_theta") or 0.0)
    factor = round(max(file.rope_factors), 4)
    for original in (2**power for power in range(4, 21)) if theta and file.architecture == "llama" else ():
        expected = _llama3_factors(theta, len(file.rope_factors), factor, original)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, file.rope_factors, strict=True)):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ModelLoadError(
        f"{file.path}: holds the tensor {ROPE_FACTORS} (up to {factor}), which is not Llama 3's formula, so the "
        f"conversion would lose it; {_REMEDY}"
    )


def _linear_rope(file: GgufFile, config: Json) -> Json | None:
    """The rotary parameters with positions divided by a factor, in every layer or in layers with full attention."""
    factor = file.fact("rope.scaling.factor")
    if file.fact("rope.scaling.type") != "linear" or factor in (None, 1.0):
        return None
    parameters: Json = config.get("rope_parameters") or {}
    full = parameters.get("full_attention")
    scaling = {"rope_type": "linear", "factor": factor}
    return parameters | ({"full_attention": full | scaling} if isinstance(full, dict) else scaling)


def _llama3_factors(theta: float, pairs: int, factor: float, original: int) -> list[float]:
    """The divisor of each frequency: 1 for short waves, `factor` for long waves, interpolated between."""
    factors = []
    for pair in range(pairs):
        waves = original / (2 * math.pi * theta ** (pair / pairs))  # in the original context
        if waves >= 4.0:
            factors.append(1.0)
        elif waves <= 1.0:
            factors.append(factor)
        else:
            smooth = (waves - 1.0) / 3.0
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


# --- the tensors ---


def check_tensors(file: GgufFile, model: Any) -> None:
    """Refuses a file with a tensor that the model does not use.

    Args:
        file: the .gguf file.
        model: the model that transformers made from it.

    Raises:
        ModelLoadError: the file holds more weights than the model; the message names unused tensors.
    """
    held = sum(size for name, size in file.tensors.items() if name != ROPE_FACTORS)
    used = sum(weight.numel() for weight in {id(w): w for w in model.state_dict(keep_vars=True).values()}.values())
    if held != used:
        unused = [name for name in file.tensors if name != ROPE_FACTORS and name not in _names(file, model)]
        raise ModelLoadError(
            f"{file.path}: holds {held:,} weights, of which the model made from it has {used:,}"
            f" ({len(unused)} tensors not used: {', '.join(unused[:3])}); {_REMEDY}"
        )


def _names(file: GgufFile, model: Any) -> set[str]:
    """llama.cpp's names of the model's weights."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    mapped = (names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict())
    return {name for name in mapped if name is not None}
