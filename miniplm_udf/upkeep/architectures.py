"""The keys of the config classes of transformers, read from their source, so that a check does not load torch.

Input: a model type and the keys of an architecture. Output: problems, each a sentence with its key and its remedy. A
class that is not found, or that inherits from another model's class, is not checked: the trainer checks all of them
again (trainer/models/model.py). Loading transformers takes seconds, and a Spark driver may not have it. Reads source
files of the installed package; writes nothing.
"""

import ast
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miniplm_udf.storage import Json

# Keys that transformers 5 accepts and moves into `rope_parameters` of the config.
_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True)
class ConfigClass:
    """A config class of transformers.

    Attributes:
        name: name of the class.
        defaults: its keys, with the values of those whose default is a plain value, else None.
        other_names: further names of keys, such as `hidden_size` for `n_embd`.
    """

    name: str
    defaults: Json
    other_names: dict[str, str]

    def value(self, architecture: Json, key: str) -> Any:
        """Returns the value of a key in an architecture, under any of its names, or its default; None if unknown.

        Args:
            architecture: the keys that the config sets.
            key: the usual name, such as `hidden_size`.
        """
        own = self.other_names.get(key, key)
        return architecture.get(key, architecture.get(own, self.defaults.get(own)))


def architecture_problems(place: str, architecture: Json) -> Iterator[str]:
    """Yields what is wrong with an architecture.

    Args:
        place: key of the architecture in the config.
        architecture: keywords of transformers' `AutoConfig`.
    """
    model_type = architecture.get("model_type")
    if model_type is None:
        yield f"{place}.model_type: expected a model type of transformers (llama, qwen2, ...), found none; set it"
        return
    types = _model_types()
    if types and model_type not in types:
        close = difflib.get_close_matches(str(model_type), types, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; choose one (llama, qwen2, gpt2, mamba, ...)"
        yield f"{place}.model_type: expected a model type of transformers, found {model_type!r}{hint}"
        return
    config_class = find_class(str(model_type))
    if config_class is not None:
        yield from _key_problems(place, architecture, config_class)
        yield from _head_problems(place, architecture, config_class)


def _key_problems(place: str, architecture: Json, config_class: ConfigClass) -> Iterator[str]:
    names = {*config_class.defaults, *config_class.other_names, "model_type"}
    if "rope_parameters" in names:
        names |= _ROPE_KEYS
    for key in architecture:
        if key not in names:
            close = difflib.get_close_matches(key, sorted(names), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; remove it"
            yield f"{place}.{key}: {config_class.name} has no key {key!r}{hint}"


def _head_problems(place: str, architecture: Json, config_class: ConfigClass) -> Iterator[str]:
    numbers = {
        key: config_class.value(architecture, key)
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    }
    size, heads, groups = (value if type(value) is int and value > 0 else None for value in list(numbers.values())[:3])
    if size and heads and not numbers["head_dim"] and size % heads:
        yield (
            f"{place}.num_attention_heads: expected a number that divides hidden_size ({size}), found {heads}; change "
            "one of them"
        )
    if heads and groups and heads % groups:
        yield (
            f"{place}.num_key_value_heads: expected a number that divides num_attention_heads ({heads}), found "
            f"{groups}; change one of them"
        )


def _folder() -> Path | None:
    spec = find_spec("transformers")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@functools.cache
def _model_types() -> dict[str, str]:
    """Names of the config classes by model type; empty if transformers is not installed, or keeps them elsewhere."""
    folder = _folder()
    file = next(folder.glob("*/auto/auto_mappings.py"), None) if folder else None
    if file is None:
        return {}
    return dict(re.findall(r'\("([\w.-]+)", "(\w+Config)"\)', file.read_text(encoding="utf-8")))


@functools.cache
def find_class(model_type: str) -> ConfigClass | None:
    """Returns the config class of a model type; None if its source cannot be found or read.

    Args:
        model_type: a model type of transformers.
    """
    folder, name = _folder(), _model_types().get(model_type)
    if folder is None or name is None:
        return None
    parts = model_type.replace("-", "_").split("_")
    # `gemma3_text` is in the folder of `gemma3`.
    names = ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]
    files = [file for part in names for file in folder.glob(f"*/{part}/configuration_{part}.py")]
    own = next((match for file in files if (match := _class_in(file, name))), None)
    base = _class_in(folder / "configuration_utils.py", "PreTrainedConfig")
    if own is None or base is None or own[1] != ["PreTrainedConfig"]:
        return None
    return ConfigClass(name, base[0].defaults | own[0].defaults, base[0].other_names | own[0].other_names)


def _class_in(file: Path, name: str) -> tuple[ConfigClass, list[str]] | None:
    """A class in a file, and the names of its bases; None if it is not there."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next((part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name), None)
    if node is None:
        return None
    defaults: Json = {}
    other_names: dict[str, str] = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            defaults[part.target.id] = part.value.value if isinstance(part.value, ast.Constant) else None
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            defaults |= dict.fromkeys(argument.arg for argument in (*part.args.args, *part.args.kwonlyargs))
        elif isinstance(part, ast.Assign) and [getattr(to, "id", None) for to in part.targets] == ["attribute_map"]:
            other_names = ast.literal_eval(part.value)
    return ConfigClass(name, defaults, other_names), [ast.unparse(base) for base in node.bases]
