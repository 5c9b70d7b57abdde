"""The facts that a .gguf file states about its tokenizer, and the check that the rebuilt tokenizer follows them.

Owns the tables of pre-tokenizer names (llama.cpp's) whose word split transformers rebuilds or `gguf_models` corrects,
and of the facts that change no encoding of raw text. Any other fact that a file states under `tokenizer.` is refused by
name. Input: the metadata of a .gguf file and a tokenizer of the package tokenizers. Output: nothing, or a
ModelLoadError. Executor side; pure. Encodes a few characters.
"""

from collections.abc import Callable
from typing import Any

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.gguf_facts import GgufFile
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE

PRE_TOKENIZER = "tokenizer.ggml.pre"
_MODEL = "tokenizer.ggml.model"
_ORDINARY = 1  # value of tokenizer.ggml.token_type: not special, not unused, not a byte
_REMEDY = "put the model's own tokenizer.json next to the file, or give the model as a folder of safetensors"

# Values of tokenizer.ggml.pre for vocabularies whose digits are split off before the byte-level split, as llama.cpp
# does; transformers rebuilds these without the split of digits.
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# With these vocabularies llama.cpp encodes a word that is a token as this token, whatever the merges say.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# Byte-level vocabularies for which llama.cpp puts a BOS in front if the file does not say whether to.
_BOS_VOCABULARIES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
# Vocabularies with GPT-2's split, which transformers uses for every name that it does not know.
_GPT2_SPLIT = ("gpt-2", "phi-2")
_OWN_SPLIT = ("qwen2", "deepseek-r1-qwen", "megrez", "gpt-4o", "llama4")
# Raw text is encoded without special tokens, and the separator and prefix come from the config.
_HARMLESS_TOKENIZER = {
    "ggml.model",
    "ggml.pre",
    "ggml.tokens",
    "ggml.token_type",
    "ggml.token_type_count",
    "ggml.scores",
    "ggml.merges",
    "ggml.add_bos_token",
    "ggml.add_eos_token",
    "ggml.add_sep_token",
}


def adds_bos(file: GgufFile) -> bool:
    """Whether texts begin with a BOS: as the file states, or as llama.cpp assumes for the vocabulary.

    Args:
        file: the facts of the file.
    """
    stated = file.metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return file.metadata.get(_MODEL) == "llama" or file.metadata.get(PRE_TOKENIZER) in _BOS_VOCABULARIES


def check_tokenizer(file: GgufFile, tokenizer: Any) -> None:
    """Refuses a file whose rebuilt tokenizer does not do what the file states.

    Args:
        file: the .gguf file.
        tokenizer: the rebuilt tokenizer, of the package tokenizers.

    Raises:
        ModelLoadError: a fact is not followed; the message has the key and its value.
    """
    # For a sentencepiece vocabulary llama.cpp puts a space in front of a text unless the file says otherwise.
    implied = {"tokenizer.ggml.add_space_prefix": True} if file.metadata.get(_MODEL) == "llama" else {}
    for key, value in (implied | file.metadata).items():
        name = key.removeprefix("tokenizer.")
        if key == name or name in _HARMLESS_TOKENIZER or name.startswith("chat_template"):
            continue
        is_id = name.endswith(("_token_id", "_token_ids"))
        if not is_id and not _BEHAVIOURS.get(name, lambda tokenizer, value: False)(tokenizer, value):
            shown = value if isinstance(value, bool | int | float | str) else type(value).__name__
            raise ModelLoadError(
                f"{file.path}: states {key}: {shown}, which the tokenizer made from it does not do; {_REMEDY}"
            )
    _check_split(file, tokenizer)


def check_vocabulary(file: GgufFile, tokenizer: Any) -> None:
    """Refuses a tokenizer.json next to the file whose tokens differ from the file's: its ids would mean other tokens.

    Args:
        file: the .gguf file.
        tokenizer: the tokenizer of the tokenizer.json.

    Raises:
        ModelLoadError: a token differs; the message names the first.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file.path)
    tokens, kinds = (reader.get_field(key) for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"))
    if tokens is None or kinds is None:
        return
    for number, (token, kind) in enumerate(zip(tokens.contents(), kinds.contents(), strict=True)):
        if kind == _ORDINARY and tokenizer.id_to_token(number) != token:
            raise ModelLoadError(
                f"{file.path.parent / TOKENIZER_FILE}: expected the vocabulary of {file.path.name}, found "
                f"{tokenizer.id_to_token(number)!r} as token {number} in place of {token!r}; put this model's own "
                f"tokenizer.json there, or remove it"
            )


def _starts_with_space(tokenizer: Any, value: Any) -> bool:
    if type(tokenizer.model).__name__ == "BPE" and "Ġ" in tokenizer.get_vocab():
        return value is False or tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("Ġ")
    return bool(tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")) == bool(value)


def _removes_spaces(tokenizer: Any, value: Any) -> bool:
    counts = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("a  b", "a b")]
    return (counts[0] == counts[1]) == bool(value)


_BEHAVIOURS: dict[str, Callable[[Any, Any], bool]] = {
    "ggml.add_space_prefix": _starts_with_space,
    "ggml.remove_extra_whitespaces": _removes_spaces,
}


def _check_split(file: GgufFile, tokenizer: Any) -> None:
    """Refuses a split into words that transformers does not rebuild; for names it does not know it takes GPT-2's."""
    kind, pre = file.metadata.get(_MODEL), file.metadata.get(PRE_TOKENIZER)
    if kind == "llama":
        return
    is_gpt2 = pre in _GPT2_SPLIT + DIGITS_APART
    is_rebuilt = pre in WHOLE_WORDS + _OWN_SPLIT and type(tokenizer.pre_tokenizer).__name__ == "Sequence"
    if kind != "gpt2" or not (is_gpt2 or is_rebuilt):
        raise ModelLoadError(
            f"{file.path}: states tokenizer.ggml.model: {kind} and tokenizer.ggml.pre: {pre}, whose split of a text "
            f"into words transformers does not rebuild; {_REMEDY}"
        )
