"""Loads a causal LM whole: every weight of the model comes from its files, and every tensor of the files is used.

Owns the call of transformers, the check of its loading report, and a second check that does not rely on the report: it
compares the names, shapes and types in the files' headers with the loaded model. (transformers fills a missing weight
with random numbers and only logs it.) Input: a model folder. Output: a torch model. Executor side and trainer. Loads
torch and transformers inside the functions. A retry loads the model again.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.weights import Tensor, tensors

_SHOWN = 3
# Prefixes that torch.compile, DDP, FSDP and activation checkpointing put into the names of weights.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_OTHER_HEADS = re.compile(r"^(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def load_causal_lm(folder: Path, **options: Any) -> Any:
    """Loads the causal LM of a folder.

    Args:
        folder: a folder with config.json and safetensors files.
        **options: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model of transformers.

    Raises:
        ModelLoadError: the model cannot be loaded, or its files lack a weight or hold a tensor that it does not use.
    """
    from transformers import AutoModelForCausalLM

    headers = tensors(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        hint = (
            "; tensors that are joined into one (experts) are missing or differ" if "CONVERSION" in str(error) else ""
        )
        raise ModelLoadError(
            f"{folder}: cannot be loaded as a causal LM: {type(error).__name__}: {error}{hint}"
        ) from error
    own_file = getattr(model.config, "transformers_weights", None)
    if own_file is not None:
        raise ModelLoadError(
            f"{folder}: config.json names its own weight file (transformers_weights: {own_file}), which no hash "
            f"covers; remove the key, and name the file model.safetensors"
        )
    check_report(str(folder), model, report)
    _check_names(folder, model, headers)
    _check_types(folder, model, headers)
    _check_head_is_tied(folder, model, headers)
    return model


def check_report(where: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuses a model whose loading report names a missing, unexpected or mismatched weight.

    transformers leaves out of the report what is accounted for: tied weights, and the tensors that the architecture
    declares unused (`_keys_to_ignore_on_load_unexpected`, rotary frequencies, masks).

    Args:
        where: the folder or file, for the message.
        model: the loaded model.
        report: the report of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ModelLoadError: the report names a weight; the message has the first few names and the likely cause.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"])
    errors = list(report.get("error_msgs", ()))
    kinds = {"missing": missing, "unexpected": unexpected}
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if mismatched:
        name, shape, expected = mismatched[0]
        parts.append(f"{len(mismatched)} of another shape ({name}: {list(shape)}, the config says {list(expected)})")
    if errors:
        parts.append(f"errors ({errors[0]})")
    if parts:
        cause = _cause(missing, unexpected, bool(mismatched), model)
        raise ModelLoadError(f"{where}: the weights are not those of the config: {', '.join(parts)}; {cause}")


def _some(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


def _cause(missing: set[str], unexpected: set[str], mismatched: bool, model: Any) -> str:
    """The likely cause of the differences and its remedy, in words."""
    for wrapper in _WRAPPERS:
        if {name.replace(wrapper, "") for name in unexpected if wrapper in name} & missing:
            return (
                f"they were saved from a compiled or a wrapped model: strip {wrapper!r} from the names of the tensors, "
                f"or save the inner model with save_pretrained"
            )
    if any("lora_" in name or name.startswith("base_model.model.") for name in unexpected):
        return "they are an adapter's (LoRA): merge it into its base model (merge_and_unload) and save that"
    if any(_OTHER_HEADS.match(name) for name in unexpected):
        return "the model has a head for another task: expected a causal LM with an output layer over its vocabulary"
    layers = _layers_differ(missing, unexpected, model)
    if layers:
        return layers
    if missing and all("lm_head" in name or "embed_out" in name for name in missing):
        return (
            "the files hold no output layer, and config.json says tie_word_embeddings: false; save the whole model, or "
            "set it to true if the model was trained so"
        )
    if mismatched:
        return "config.json belongs to a model of another size: put the config.json of these weights into the folder"
    return "the files are not whole, or config.json belongs to another architecture: fetch or save the model again"


def _layers_differ(missing: set[str], unexpected: set[str], model: Any) -> str | None:
    """The cause in words, with both numbers of layers, if whole layers are missing or left over; else None."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    numbers = [{int(match[1]) for match in map(_LAYER.search, names) if match} for names in (missing, unexpected)]
    if not isinstance(n_layers, int):
        return None
    if numbers[1] and not missing and min(numbers[1]) >= n_layers:
        held = max(numbers[1]) + 1
        return f"config.json says {n_layers} layers, the files hold {held}: put the config.json of these weights there"
    first = min(numbers[0], default=n_layers)
    if (
        numbers[0]
        and numbers[0] == set(range(first, n_layers))
        and not unexpected
        and _whole_layers(missing, numbers[0])
    ):
        return f"config.json says {n_layers} layers, the files hold {first}: put the config.json of these weights there"
    return None


def _whole_layers(names: set[str], layers: set[int]) -> bool:
    """Whether the names belong to these layers only, and to several weights of each."""
    counts = [sum(1 for name in names if (match := _LAYER.search(name)) and int(match[1]) == n) for n in layers]
    return sum(counts) == len(names) and min(counts) > 1


def _check_names(folder: Path, model: Any, headers: dict[str, Tensor]) -> None:
    """Refuses a model with weights that cannot come from the tensors of the files.

    A weight comes from the tensor with its name (with or without the base model's name in front), or with the name of a
    weight that is tied to it. Weights that transformers makes from tensors with other names (it stacks experts) must
    not have more elements together than the stored tensors.
    """
    names = _model_names(model, headers)
    groups: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(weight), []).append(name)
        sizes[id(weight)] = weight.numel()
    nameless = {key: group for key, group in groups.items() if not names.keys() & set(group)}
    spare = sum(tensor.n_elements for name, tensor in headers.items() if name not in set(names.values()))
    if sum(sizes[key] for key in nameless) > spare:
        absent = [group[0] for group in nameless.values()]
        raise ModelLoadError(
            f"{folder}: {len(absent)} weights of the model ({_some(absent)}) are in none of the files; "
            f"fetch or save the model again"
        )


def _model_names(model: Any, headers: Collection[str]) -> dict[str, str]:
    """Maps each weight of the model to the tensor of the files with its name, for weights that have one."""
    prefix = f"{model.base_model_prefix}."
    pairs: dict[str, str] = {}
    for name in model.state_dict():
        spellings: tuple[str, ...] = (name, name.removeprefix(prefix), prefix + name)
        match = next((spelling for spelling in spellings if spelling in headers), None)
        if match is not None:
            pairs[name] = match
    return pairs


def _check_types(folder: Path, model: Any, headers: dict[str, Tensor]) -> None:
    """Refuses integers and 8-bit floats without a `quantization_config`: nothing says how to scale them."""
    if getattr(model.config, "quantization_config", None) is not None:
        return
    names = _model_names(model, headers)
    parameters = {name for name, _ in model.named_parameters()}
    unreadable = {
        source: headers[source].dtype
        for name, source in names.items()
        if name in parameters and headers[source].dtype not in _FLOATS
    }
    if unreadable:
        name, dtype = next(iter(unreadable.items()))
        raise ModelLoadError(
            f"{folder}: {len(unreadable)} weights are stored as {dtype} ({_some(unreadable)}), and config.json has no "
            f"quantization_config that says how to read them ({name}); give the model in float32, bfloat16 or float16"
        )


def _check_head_is_tied(folder: Path, model: Any, headers: Collection[str]) -> None:
    """Refuses files with an own output layer if the config ties it to the embeddings, since either may be right."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) or "lm_head.weight" not in headers:
        return
    tied = model._tied_weights_keys or {}
    # BigBird-Pegasus and CPM-Ant tie nothing, whatever the config says: the output layer of the files is theirs.
    if "lm_head.weight" not in (*tied, *(tied.values() if isinstance(tied, dict) else ())):
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None and weight.data_ptr() != embeddings.weight.data_ptr():
        raise ModelLoadError(
            f"{folder}: config.json says tie_word_embeddings: true, and the files hold an lm_head.weight that differs "
            f"from the embeddings; set it to false if the model was trained so, or remove lm_head.weight"
        )
