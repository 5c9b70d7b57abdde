"""A model's description, and the loaded torch model. Executor side.

Owns what a description holds, and the check that `head` computes the model's own logits.
Input: a `ModelConfig` with a path, whose files `model_files` finds. Output: a `ModelDescription`, a torch model. torch
and transformers are loaded inside the functions that need them.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from miniplm_udf import storage
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import ModelConfig, ServerConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.device_maps import check_split, split_options
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.prefix import find_prefix, in_words
from miniplm_udf.scoring.separators import eos_token, find_separator, token_id
from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash
from miniplm_udf.scoring.tokenizer_checks import check_every_byte, lost_differences, tokenizer_warnings
from miniplm_udf.scoring.weights import SOURCE_FILE, n_parameters, weights_hash

_PROBE_TOLERANCE = 1e-3


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
    vocab_size = int(architecture.get_text_config().vocab_size)
    bos_id = None if prefix.token is None else token_id(f"models.{alias}.bos_token", prefix.token, tokenizer)
    longest = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    check_context(alias, config, longest, has_bos=bos_id is not None)
    lost = lost_differences(tokenizer)
    separator, separator_id = find_separator(alias, folder, tokenizer, config)
    prefix_token = prefix_id = None
    if config.context_prefix == "token":
        check_every_byte(alias, lost)
        prefix_token = config.prefix_token or prefix.token or separator
        prefix_id = token_id(f"models.{alias}.prefix_token", prefix_token, tokenizer)
    parameters = n_parameters(folder) if config.server is None else _n_parameters_of(architecture, config)
    warnings = [
        *_warnings(alias, folder, tokenizer, vocab_size, separator),
        *tokenizer_warnings(alias, tokenizer, lost),
    ]
    if not parameters:
        warnings.append(f"{alias}: its config.json does not tell its number of weights, so its FLOPs are not counted")
    return ModelDescription(
        model_id=alias,
        tokenizer_hash=tokenizer_hash(folder),
        dtype=_settled_dtype(alias, config, dtype),
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
        n_parameters=parameters,
        weights_hash=weights_hash(folder) if config.server is None else _served_hash(config.server),
        path=_place(config),
        warnings=warnings,
    )


def _architecture(folder: Path, config: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        hint = "" if config.trust_remote_code else " (trust_remote_code is off: turn it on only for code you have read)"
        raise ModelLoadError(f"{folder}: config.json cannot be read: {type(error).__name__}: {error}{hint}") from error


def _n_parameters_of(architecture: Any, config: ModelConfig) -> int:
    """The number of weights of a model whose weight files are not here; makes none of them. 0 if nobody can say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        with contextlib.suppress(Exception), torch.device("meta"):
            model = kind.from_config(architecture, trust_remote_code=config.trust_remote_code)
            return sum(weight.numel() for weight in model.parameters())
    return 0


def _place(config: ModelConfig) -> str:
    """Where a model came from, without secrets."""
    place = storage.redact(str(config.path)) + (f"@{config.revision}" if config.revision else "")
    if config.server is None:
        return place
    server = config.server
    return f"{place}, served as {server.model}" + (f"@{server.revision}" if server.revision else "")


def _served_hash(server: ServerConfig) -> str:
    return fingerprint("server", server.model, server.revision)


def check_context(alias: str, config: ModelConfig, longest: int | None, has_bos: bool) -> None:
    """Checks that the longest input of a forward pass is not longer than the model's context.

    Args:
        alias: the model's name in the config.
        config: the model's settings.
        longest: `max_position_embeddings` of the model; None if it has no such limit.
        has_bos: whether a BOS stands in front of every window.

    Raises:
        ConfigError: it is longer.
    """
    more = {"its BOS": 1} if has_bos else {}
    if config.server is not None:
        more |= {"the last target and a generated token of a request": 2}
    n_more = sum(more.values())
    if longest is not None and config.context_tokens + n_more > longest:
        raise ConfigError(
            f"models.{alias}.context_tokens: expected at most {longest - n_more} (the model's "
            f"max_position_embeddings{''.join(f', less {name}' for name in more)}), found {config.context_tokens}; "
            f"set models.{alias}.context_tokens={longest - n_more}"
        )


def _settled_dtype(
    alias: str, config: ModelConfig, settled: str | None
) -> Literal["float32", "bfloat16", "float8", "server"]:
    if config.server is not None:
        return "server"
    dtype = settled if config.dtype == "auto" else config.dtype
    if dtype is None:
        import torch

        return "bfloat16" if torch.cuda.is_available() else "float32"
    if dtype == "float8" and config.device_map is not None:
        raise ConfigError(
            f"models.{alias}.device_map: expected null with dtype float8, whose layers cannot be split over GPUs, "
            f"found auto; set models.{alias}.dtype: bfloat16"
        )
    if dtype not in ("float32", "bfloat16", "float8"):
        raise ConfigError(f"models.{alias}.dtype: expected float32, bfloat16 or float8, found {dtype!r}")
    return dtype  # type: ignore[return-value]


def _warnings(alias: str, folder: Path, tokenizer: Tokenizer, vocab_size: int, separator: str) -> list[str]:
    warnings = []
    eos = eos_token(folder, tokenizer)
    # A model of this project's trainer may have the tokenizer of its teacher, with the chat template.
    if not (folder / TRAINING_FILE).is_file() and eos not in (None, separator):
        warnings.append(
            f"{alias} may be chat-tuned (its eos_token {eos} is not its document separator {separator}): then its "
            "likelihoods of raw text are distorted"
        )
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
    config: ModelConfig,
    description: ModelDescription,
    device: str | Sequence[str] = "cpu",
    attention: str | None = None,
) -> Any:
    """Loads a model onto a device, in eval mode and in the described dtype; on a CPU with packed weights.

    Args:
        config: the model's path.
        description: the model's description, which settles the dtype.
        device: a torch device; a list splits the model over its devices (`device_maps`), and inputs then go to
            `model.device`.
        attention: an attention backend of transformers; None takes the fastest that gives equal results.

    Returns:
        The model of transformers.

    Raises:
        ModelLoadError: it cannot be loaded whole, does not fit on the devices, or `check_head`, `check_batching` or
            `use_float8` refuses it.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from miniplm_udf.scoring.attention import improve_attention
    from miniplm_udf.scoring.batching import check_batching
    from miniplm_udf.scoring.cpu import prepare
    from miniplm_udf.scoring.float8 import use_float8

    folder = model_folder(config)
    transformers_logging.disable_progress_bar()
    model = load_causal_lm(
        folder,
        dtype=torch.bfloat16 if description.dtype == "float8" else getattr(torch, description.dtype),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=attention,
        **({} if isinstance(device, str) else split_options(device)),
    )
    if description.dtype == "float32":
        # TF32 is on by default for convolutions, which Mamba has, and keeps only ten bits of precision.
        torch.backends.cudnn.allow_tf32 = False
    if isinstance(device, str):
        model = model.to(device)
    else:
        check_split(model, device)
    model = model.eval().requires_grad_(False)
    if attention is None:
        improve_attention(model)
    if description.dtype == "float8":
        # After the choice of the attention, whose comparison float8 would make less exact.
        use_float8(model)
    if model.device.type == "cpu":
        prepare(model)
    check_head(model, description.vocab_size, model.device)
    check_batching(model, description)
    return model


def check_head(model: Any, vocab_size: int, device: Any = "cpu") -> None:
    """Compares the logits of `Head` with the model's own on a few tokens.

    Args:
        model: a loaded model of transformers.
        vocab_size: rows of its embedding.
        device: the device of the model's input.

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
        head_BTV = torch.log_softmax(head.logits(head.hidden(input_BT)), dim=-1).to(expected_BTV.device)
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
