"""The token that ended documents in a model's pre-training, and single tokens of a vocabulary in general.

Owns the rule for a separator that the config does not name: the tokenizer's `eos_token`, unless it may end a chat turn.
That is judged by the model's files, not by the look of a name: the chat template writes the token, or the vocabulary
has another token that is known to end documents. A named separator is any single token whose id the model has, special
or not. Input: a local model folder and its tokenizer. Output: tokens and ids, or a ConfigError with the key. Pure.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# End-of-document tokens of pre-training, in the order in which messages suggest them.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|end▁of▁sentence|>", "[EOS]", "<EOS>", "<|eos|>")


def find_separator(alias: str, folder: Path, tokenizer: "Tokenizer", config: ModelConfig) -> tuple[str, int]:
    """Returns the document separator of a model and its id: from the config, otherwise from the model's files.

    Args:
        alias: the model's name in the config.
        folder: the model's folder.
        tokenizer: the folder's tokenizer.
        config: the model's settings.

    Raises:
        ConfigError: it is not one token, or the files do not tell it.
    """
    separator = config.document_separator or _stated_separator(alias, folder, tokenizer)
    return separator, token_id(f"models.{alias}.document_separator", separator, tokenizer)


def token_id(key: str, token: str, tokenizer: "Tokenizer", n_ids: int | None = None) -> int:
    """Returns the id of a single token.

    Args:
        key: the key of the config that names the token.
        token: the token.
        tokenizer: the tokenizer.
        n_ids: ids that the model has; None does not check.

    Raises:
        ConfigError: it is not one token, or the model has no such id.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        candidates = [name for name in _SEPARATORS if tokenizer.token_to_id(name) is not None]
        raise ConfigError(
            f"{key}: expected one token of the vocabulary, found {token!r}, which is not one"
            + (f"; candidates are {', '.join(candidates)}" if candidates else "; name a token of its tokenizer.json")
        )
    if n_ids is not None and number >= n_ids:
        raise ConfigError(
            f"{key}: expected a token whose id the model has (below {n_ids}, the vocab_size of its config.json), found "
            f"{token!r} with the id {number}; name another token"
        )
    return int(number)


def eos_token(folder: Path, tokenizer: "Tokenizer") -> str | None:
    """Returns the `eos_token` of a model's files; None if they state none.

    Args:
        folder: the model's folder.
        tokenizer: the folder's tokenizer.
    """
    token = _tokenizer_config(folder).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        number = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = tokenizer.id_to_token(number) if isinstance(number, int) else None
    return token


def _stated_separator(alias: str, folder: Path, tokenizer: "Tokenizer") -> str:
    eos = eos_token(folder, tokenizer)
    # A model of this project's trainer has the separator that its sequences were packed with.
    if eos is not None and (folder / TRAINING_FILE).is_file():
        return eos
    return default_separator(alias, eos, chat_template(folder), lambda token: tokenizer.token_to_id(token) is not None)


def usual_separators(has_token: Callable[[str], bool]) -> list[str]:
    """Returns the tokens of a vocabulary that usually end documents in pre-training.

    Args:
        has_token: whether the vocabulary has a token.
    """
    return [token for token in _SEPARATORS if has_token(token)]


def default_separator(alias: str, eos: str | None, template: str, has_token: Callable[[str], bool]) -> str:
    """Returns the `eos_token` of a model, if nothing says that it ends a chat turn instead of a document.

    Args:
        alias: the model's name in the config.
        eos: the `eos_token`; None if the files state none.
        template: text of the chat template; "" for none.
        has_token: whether the vocabulary has a token.

    Raises:
        ConfigError: it may end a chat turn, or there is none.
    """
    candidates = usual_separators(has_token)
    if eos is not None:
        if (doubt := chat_doubt(eos, template, has_token)) is None:
            return eos
        problem = f"eos_token {eos!r}{doubt}"
    else:
        problem = "a tokenizer without an eos_token"
    key = f"models.{alias}.document_separator"
    raise ConfigError(
        f"{key}: expected the token that ended documents in pre-training, found {problem}; set {key}"
        + (f" (this vocabulary has {', '.join(candidates)})" if candidates else " to a token of its vocabulary")
    )


def chat_doubt(token: str, template: str, has_token: Callable[[str], bool]) -> str | None:
    """Returns why a token may end a chat turn instead of a document, to stand after the token; None for no reason.

    Args:
        token: the token.
        template: text of the chat template; "" for none.
        has_token: whether the vocabulary has a token.
    """
    if token in _SEPARATORS:
        return None
    if token in template:
        return ", which the chat template writes, so that it ends a chat turn"
    candidates = usual_separators(has_token)
    return f" next to {candidates[0]!r} in one vocabulary, so that it may end a chat turn" if candidates else None


def chat_template(folder: Path) -> str:
    """Returns the text of a folder's chat template; "" if it has none.

    Args:
        folder: a model's folder.
    """
    template = _tokenizer_config(folder).get("chat_template") or ""
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return f"{template}{text}"


def _tokenizer_config(folder: Path) -> Json:
    path = folder / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
