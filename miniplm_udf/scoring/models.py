"""Model folders: where a model's files are, its description, and the loaded torch model. Executor side.

Owns the ways to name a model (folder, URI, hub name, .gguf file, `package:NAME/FILE`), the rules for its separator and
prefix tokens, and the check that `head` computes the model's own logits. Input: a `ModelConfig` with a path. Output: a
local folder, a `ModelDescription`, a torch model. Files are fetched or converted once on each node; a retry finds them
there. torch and transformers are loaded inside the functions that need them.
"""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from miniplm_udf import storage
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.gguf_models import gguf_folder
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.scoring.prefix import find_prefix, in_words
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE, load_tokenizer, tokenizer_hash
from miniplm_udf.scoring.tokenizer_checks import check_every_byte, lost_differences, tokenizer_warnings
from miniplm_udf.scoring.weights import SOURCE_FILE, n_parameters, weight_files, weights_hash
from miniplm_udf.storage import Json

__all__ = ["ModelDescription", "describe", "load_model", "model_folder"]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
# The same weights in the format of another program.
_NOT_FETCHED = ["consolidated*.safetensors"]
# End-of-document tokens of pre-training, in the order in which messages suggest them.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|end▁of▁sentence|>", "[EOS]", "<EOS>", "<|eos|>")
_CHAT_TOKEN = re.compile(
    r"im_end|eot|end_of_turn|turn\|?>|<\|end\|>|assistant|user|<\|eom|message|return|chat", re.IGNORECASE
)
_PROBE_TOLERANCE = 1e-3


# --- where the files are ---


def model_folder(config: ModelConfig) -> Path:
    """The local folder of a model, with config.json, safetensors and tokenizer.json; fetched or converted if needed.

    Args:
        config: the model; its `path` is a folder, the `file:` or remote URI of a folder, a hub name, a `.gguf` file, or
            `package:NAME/FILE` for a file or folder inside an installed Python package.

    Raises:
        ModelLoadError: there is no such model, or its folder lacks files that scoring needs.
    """
    path = config.path
    if path is None:
        raise ModelLoadError("path: expected a model's path, found null, which is for a model that this run trains")
    if path.startswith("package:"):
        local = _in_package(path)
    elif path.endswith(".gguf") and not storage.is_local(path):
        local = storage.local_folder(path.rpartition("/")[0]) / path.rpartition("/")[2]
    elif storage.is_local(path) and (_existing(path) or path.endswith(".gguf") or not _HUB_NAME.match(path)):
        local = _existing(path) or _missing(path)
    elif storage.is_local(path):
        local = _from_hub(path, config.revision)
    else:
        try:
            local = storage.local_folder(path)
        except Exception as error:
            raise ModelLoadError(
                f"{storage.redact(path)}: cannot be fetched: {type(error).__name__}: {error}"
            ) from error
    folder = gguf_folder(local) if local.suffix == ".gguf" and local.is_file() else local
    return _complete(folder, config)


def _existing(path: str) -> Path | None:
    local = Path(storage.local_path(path)).expanduser() if path.startswith("file:") else Path(path).expanduser()
    return local.absolute() if local.exists() else None


def _missing(path: str) -> Path:
    raise ModelLoadError(
        f"{path}: expected a model folder, a .gguf file or a hub name (owner/name), found no such file or folder; "
        f"relative paths are taken from {Path.cwd()}"
    )


def _in_package(path: str) -> Path:
    package, slash, inner = path.removeprefix("package:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not slash:
        raise ModelLoadError(
            f"{path}: expected package:NAME/FILE of an installed Python package, found no package {package!r}; "
            f"install it where the scoring runs"
        )
    for folder in spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]:
        if (Path(folder) / inner).exists():
            return Path(folder) / inner
    raise ModelLoadError(f"{path}: the package {package!r} is installed, but holds no {inner!r}")


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FETCHED))
    except Exception as error:
        raise ModelLoadError(
            f"{name}: there is no such local folder (searched in {Path.cwd()}), and as a hub name"
            f"{f' at revision {revision}' if revision else ''} it cannot be fetched "
            f"({type(error).__name__}: {error}); correct the path, or fetch the model where there is a network"
        ) from error


def _complete(folder: Path, config: ModelConfig) -> Path:
    """The folder if it has all files; if only tokenizer.json is missing, a folder in the cache that has it."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder}: expected a model folder with a config.json, found none")
    weight_files(folder)
    return folder if (folder / TOKENIZER_FILE).is_file() else _with_fast_tokenizer(folder, config.trust_remote_code)


def _with_fast_tokenizer(folder: Path, trust_remote_code: bool) -> Path:
    """A folder in the cache with links to the files of `folder`, and a tokenizer.json made by transformers."""
    import os
    import shutil
    import tempfile

    from transformers import AutoTokenizer

    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    target = storage.cache_folder() / "tokenizers" / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]
    if target.exists():
        return target
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise ModelLoadError(
            f"{folder}: a fast tokenizer is needed; expected tokenizer.json, found none, and transformers cannot make "
            f"one ({type(error).__name__}: {error})"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building."))
    for file, _, _ in stamps:
        (staging / Path(file).name).symlink_to(Path(file).resolve())
    (staging / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    try:
        os.replace(staging, target)
    except OSError:  # another process was first
        shutil.rmtree(staging)
    return target


# --- the description of the model ---


def describe(alias: str, config: ModelConfig, dtype: str | None = None) -> ModelDescription:
    """Returns the description of a model, without loading its weights.

    Args:
        alias: the model's name in the config.
        config: the model's path and settings.
        dtype: the dtype that was settled at this model's first scoring; None settles it for this machine.

    Raises:
        ConfigError: the separator or the prefix has to be named or is no token, the context is too long, or every byte
            shall be scored with a tokenizer that loses some.
        ModelLoadError: the model cannot be found or read.
    """
    folder = model_folder(config)
    architecture = _architecture(folder, config)
    tokenizer = load_tokenizer(folder)
    prefix = find_prefix(alias, folder, tokenizer, config)
    bos_id = None if prefix.token is None else _token_id(alias, "bos_token", prefix.token, tokenizer)
    _check_context(alias, config, architecture, n_prefix=0 if bos_id is None else 1)
    lost = lost_differences(tokenizer)
    separator = config.document_separator or _default_separator(alias, folder, tokenizer)
    separator_id = _token_id(alias, "document_separator", separator, tokenizer)
    prefix_token = prefix_id = None
    if config.context_prefix == "token":
        check_every_byte(alias, lost)
        prefix_token = config.prefix_token or prefix.token or separator
        prefix_id = _token_id(alias, "prefix_token", prefix_token, tokenizer)
    vocab_size = int(architecture.get_text_config().vocab_size)
    return ModelDescription(
        model_id=alias,
        tokenizer_hash=tokenizer_hash(folder),
        dtype=_settled_dtype(config, dtype),
        context_tokens=config.context_tokens,
        window_overlap_tokens=config.window_overlap_tokens,
        context_prefix=config.context_prefix,
        document_separator=separator,
        document_separator_id=separator_id,
        prefix_token_id=prefix_id,
        bos_token=prefix.token,
        bos_token_id=bos_id,
        prefix=in_words(prefix, prefix_token),
        vocab_size=vocab_size,
        n_parameters=n_parameters(folder),
        weights_hash=weights_hash(folder),
        path=storage.redact(str(config.path)) + (f"@{config.revision}" if config.revision else ""),
        warnings=[*_warnings(alias, folder, tokenizer, vocab_size), *tokenizer_warnings(alias, tokenizer, lost)],
    )


def _architecture(folder: Path, config: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        hint = "" if config.trust_remote_code else " (trust_remote_code is off: turn it on only for code you have read)"
        raise ModelLoadError(f"{folder}: config.json cannot be read: {type(error).__name__}: {error}{hint}") from error


def _check_context(alias: str, config: ModelConfig, architecture: Any, n_prefix: int) -> None:
    longest = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context_tokens + n_prefix > longest:
        raise ConfigError(
            f"models.{alias}.context_tokens: expected at most {longest - n_prefix} (the model's "
            f"max_position_embeddings{', less its BOS' if n_prefix else ''}), found {config.context_tokens}"
        )


def _tokenizer_config(folder: Path) -> Json:
    path = folder / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _has_chat_template(folder: Path) -> bool:
    return bool(_tokenizer_config(folder).get("chat_template")) or (folder / "chat_template.jinja").is_file()


def _eos_token(folder: Path, tokenizer: Tokenizer) -> str | None:
    token = _tokenizer_config(folder).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        number = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = tokenizer.id_to_token(number) if isinstance(number, int) else None
    return token


def _default_separator(alias: str, folder: Path, tokenizer: Tokenizer) -> str:
    """The tokenizer's eos_token, if it ends a document and not a chat turn.

    Raises:
        ConfigError: it does not, or there is none.
    """
    eos = _eos_token(folder, tokenizer)
    # Base models may have a chat template too, so the token itself decides if it is a known token of pre-training.
    if eos is not None and not _CHAT_TOKEN.search(eos) and (eos in _SEPARATORS or not _has_chat_template(folder)):
        return eos
    candidates = [token for token in _SEPARATORS if tokenizer.token_to_id(token) is not None and token != eos]
    problem = f"eos_token {eos!r}, which ends a chat turn" if eos is not None else "a tokenizer without an eos_token"
    raise ConfigError(
        f"models.{alias}.document_separator: expected the token that ended documents in pre-training, found {problem}; "
        f"set models.{alias}.document_separator"
        + (f" (this vocabulary has {', '.join(candidates)})" if candidates else "")
    )


def _token_id(alias: str, key: str, token: str, tokenizer: Tokenizer) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        candidates = [name for name in _SEPARATORS if tokenizer.token_to_id(name) is not None]
        raise ConfigError(
            f"models.{alias}.{key}: expected one token of the vocabulary, found {token!r}, which is not one"
            + (f"; candidates are {', '.join(candidates)}" if candidates else "")
        )
    return int(number)


def _settled_dtype(config: ModelConfig, settled: str | None) -> Literal["float32", "bfloat16"]:
    if config.dtype != "auto":
        return config.dtype
    if settled is not None:
        if settled not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype: expected float32 or bfloat16, found {settled!r}")
        return "bfloat16" if settled == "bfloat16" else "float32"
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _warnings(alias: str, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    warnings = []
    eos = _eos_token(folder, tokenizer)
    # A model of this project's trainer may have the tokenizer of its teacher, with the chat template.
    if not (folder / TRAINING_FILE).is_file() and eos is not None and _CHAT_TOKEN.search(eos):
        warnings.append(f"{alias} is chat-tuned (its eos_token is {eos}): its likelihoods of raw text are distorted")
    source = folder / SOURCE_FILE
    if source.is_file() and json.loads(source.read_text(encoding="utf-8"))["quantised"]:
        warnings.append(f"{alias} is quantised: its scores differ from those of the full-precision weights")
    n_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    if n_tokens > vocab_size:
        warnings.append(
            f"{alias}: its tokenizer has {n_tokens} ids, the model {vocab_size}; texts with others are rejected"
        )
    return warnings


# --- the loaded model ---


def load_model(
    config: ModelConfig, description: ModelDescription, device: str = "cpu", attention: str | None = None
) -> Any:
    """Loads a model onto a device, in eval mode and in the described dtype; on a CPU with packed weights.

    Args:
        config: the model's path.
        description: the model's description, which settles the dtype.
        device: a torch device.
        attention: an attention backend of transformers; None takes the fastest that gives equal results.

    Returns:
        The model of transformers.

    Raises:
        ModelLoadError: it cannot be loaded whole, or `check_head` or `check_batching` refuses it.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from miniplm_udf.scoring.attention import improve_attention
    from miniplm_udf.scoring.batching import check_batching
    from miniplm_udf.scoring.cpu import prepare

    folder = model_folder(config)
    transformers_logging.disable_progress_bar()
    model = load_causal_lm(
        folder,
        dtype=getattr(torch, description.dtype),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=attention,
    )
    if description.dtype == "float32":
        # TF32 is on by default for convolutions, which Mamba has, and keeps only ten bits of precision.
        torch.backends.cudnn.allow_tf32 = False
    model = model.to(device).eval().requires_grad_(False)
    if model.device.type == "cpu":
        prepare(model)
    if attention is None:
        improve_attention(model)
    check_head(model, description.vocab_size, device)
    check_batching(model, description)
    return model


def check_head(model: Any, vocab_size: int, device: str = "cpu") -> None:
    """Compares the logits of `Head` with the model's own on a few tokens.

    Args:
        model: a loaded model of transformers.
        vocab_size: rows of its embedding.
        device: the model's device.

    Raises:
        ModelLoadError: they differ, so the architecture transforms its logits in an unknown way.
    """
    import torch

    from miniplm_udf.scoring.head import Head

    head = Head(model)
    generator = torch.Generator().manual_seed(0)
    input_BT = torch.randint(0, vocab_size, (2, 8), generator=generator).to(device)
    with torch.inference_mode():
        expected_BTV = torch.log_softmax(model(input_ids=input_BT, use_cache=False).logits.float(), dim=-1)
        head_BTV = torch.log_softmax(head.logits(head.hidden(input_BT)), dim=-1)
    if expected_BTV.shape != head_BTV.shape:
        difference = f"shapes {tuple(head_BTV.shape)} and {tuple(expected_BTV.shape)}"
    else:
        # bfloat16 keeps 8 bits, and the same product in tiles of another shape may differ in the last bit.
        tolerance = _PROBE_TOLERANCE if expected_BTV.dtype == model.dtype else 0.05
        worst = float((expected_BTV - head_BTV).abs().max())
        if worst <= tolerance:
            return
        difference = f"log probabilities that differ by up to {worst:.3g}"
    raise ModelLoadError(
        f"{type(model).__name__}: expected the output layer to give the model's own logits, found {difference}; "
        f"this architecture transforms its logits in a way that cannot be scored exactly here"
    )
