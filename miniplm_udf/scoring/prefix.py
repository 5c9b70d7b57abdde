"""The token that a model expects in front of a text: the BOS of its pre-training, as its tokenizer's files state it.

Owns the rules and their order. The first file with a statement decides: training.json (a model of this project's
trainer never saw a BOS), `tokenizer.ggml.add_bos_token` of a GGUF, `add_bos_token` of tokenizer_config.json, the
post-processor of tokenizer.json. `bos_token_id` of config.json does not count: models without a BOS have one, too.
Input: a local model folder. Output: a `Prefix` with the reason in words. Executor side; pure.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE
from miniplm_udf.scoring.weights import SOURCE_FILE
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AUTO, NONE = "auto", "none"


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The token in front of every window.

    Attributes:
        token: the token; None for no token.
        reason: the setting or file that decided, in words.
    """

    token: str | None
    reason: str


def find_prefix(alias: str, folder: Path, tokenizer: "Tokenizer", config: ModelConfig) -> Prefix:
    """Returns the prefix of a model: from the config if it names one, otherwise from the model's files.

    Args:
        alias: the model's name in the config.
        folder: the model's folder.
        tokenizer: the folder's tokenizer.
        config: the model's settings.

    Raises:
        ConfigError: the files ask for a BOS without naming it, or for more than one token.
    """
    if config.bos_token == NONE:
        return Prefix(None, f"models.{alias}.bos_token is none")
    if config.bos_token != AUTO:
        return Prefix(config.bos_token, f"models.{alias}.bos_token")
    if (folder / TRAINING_FILE).is_file():
        return Prefix(None, "the trainer of this project puts no BOS in front")
    stated, where = _stated(folder)
    if stated is None:
        return _of_template(alias, _template_tokens(folder))
    token = named_bos(folder, tokenizer) if stated else None
    if stated and token is None:
        raise ConfigError(
            f"models.{alias}.bos_token: {where} is true in {folder}, but no file there names the BOS; set "
            f"models.{alias}.bos_token to the token, or to none"
        )
    return Prefix(token, where if stated else f"{where} is false")


def named_bos(folder: Path, tokenizer: "Tokenizer") -> str | None:
    """The token that the files of a model call the BOS, whether or not it stands in front of texts; None for none.

    Args:
        folder: the model's folder.
        tokenizer: the folder's tokenizer.
    """
    number = _json(folder / SOURCE_FILE).get("bos_token_id")
    if isinstance(number, int):
        return _token_of(tokenizer, number)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(folder / name).get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    template = _template_tokens(folder)
    number = _json(folder / "config.json").get("bos_token_id")
    return template[0] if template else _token_of(tokenizer, number) if isinstance(number, int) else None


def in_words(prefix: Prefix, prefix_token: str | None) -> str:
    """The tokens in front of texts and windows, and the reason, in words.

    Args:
        prefix: the result of `find_prefix`.
        prefix_token: the token in front of a text with `context_prefix: token`; None for the official arithmetic.
    """
    windows = f"{prefix.token} in front of every window" if prefix.token else "no BOS"
    if prefix_token is not None and prefix_token != prefix.token:
        return f"{prefix_token} in front of each text, {windows} ({prefix.reason})"
    return f"{windows} ({prefix.reason})"


def _stated(folder: Path) -> tuple[bool | None, str]:
    """Whether a file states that a BOS is added, and the key that states it; (None, "") if no file does."""
    for name, where in (
        (SOURCE_FILE, "tokenizer.ggml.add_bos_token"),
        ("tokenizer_config.json", "add_bos_token of tokenizer_config.json"),
    ):
        stated = _json(folder / name).get("add_bos_token")
        if isinstance(stated, bool):
            return stated, where
    return None, ""


def _of_template(alias: str, tokens: list[str]) -> Prefix:
    where = f"post-processor of {TOKENIZER_FILE}"
    if len(tokens) > 1:
        raise ConfigError(
            f"models.{alias}.bos_token: expected at most one token in front of a text, found {len(tokens)} in the "
            f"{where} ({' '.join(tokens)}); set models.{alias}.bos_token to one of them, or to none"
        )
    return Prefix(tokens[0], where) if tokens else Prefix(None, "its tokenizer adds none")


def _template_tokens(folder: Path) -> list[str]:
    """The special tokens that the post-processor of tokenizer.json puts in front of a single text."""
    pending = [_json(folder / TOKENIZER_FILE).get("post_processor")]
    while pending:
        processor = pending.pop(0) or {}
        if processor.get("type") == "Sequence":
            pending = [*processor.get("processors", []), *pending]
        elif processor.get("type") == "TemplateProcessing":
            return _before_text(processor)
        elif processor.get("type") in ("BertProcessing", "RobertaProcessing"):
            return [str(processor["cls"][0])]
    return []


def _before_text(processor: Json) -> list[str]:
    tokens: list[str] = []
    for part in processor["single"]:
        if "SpecialToken" not in part:
            break
        tokens += processor["special_tokens"][part["SpecialToken"]["id"]]["tokens"]
    return tokens


def _token_of(tokenizer: "Tokenizer", number: int) -> str | None:
    token = tokenizer.id_to_token(number) if number >= 0 else None
    return None if token is None else str(token)


def _json(path: Path) -> Json:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
