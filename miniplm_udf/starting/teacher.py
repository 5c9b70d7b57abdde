"""Reads the files of a teacher: family, size, separator, prefix, context, dtype; whether it is tuned or quantised.

Input: a folder, a hub name, a `.gguf` file or `package:NAME/FILE`. Output: `TeacherFacts`. Reads config.json, the
tokenizer's files and the headers of the weights, and no weight. Of a hub model that is not on this machine, only the
small files are fetched, into a temporary folder. A model folder can be read in the base install.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, MiniplmError, ModelLoadError
from miniplm_udf.similar_paths import did_you_mean
from miniplm_udf.storage import Json

_ALIAS = "teacher"
_TUNED_NAME = re.compile(r"instruct|[-_.](chat|it|sft|dpo|rlhf)\b", re.IGNORECASE)
_SMALL_FILES = ["*.json", "*.jinja"]
# Values of general.file_type for tensors that are not quantised: F32, F16, BF16.
_UNQUANTISED = (0, 1, 32)
_BYTES_PER_TOKEN = 4.0


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """Facts from the files of a model.

    Attributes:
        path: as the config names it; a local path is absolute.
        family: model type of transformers, or architecture of the .gguf file.
        n_parameters: number of weights; None if the files that are here do not tell.
        n_ids: size of the vocabulary.
        longest: tokens of its longest input; None if it has no limit.
        separator: the token that ended documents in its pre-training.
        separator_reason: the file or the rule that tells it.
        prefix: the BOS; None for no token.
        prefix_reason: the file that tells it.
        dtype: dtype of its weights, as its files name it.
        tuned: why it may be chat-tuned; empty if nothing says so.
        quantised: how it is quantised; empty if it is not.
        bytes_per_token: bytes of text in one of its tokens, measured or, without its tokenizer, assumed.
        is_measured: whether `bytes_per_token` was measured.
    """

    path: str
    family: str
    n_parameters: int | None
    n_ids: int
    longest: int | None
    separator: str
    separator_reason: str
    prefix: str | None
    prefix_reason: str
    dtype: str
    tuned: str
    quantised: str
    bytes_per_token: float = _BYTES_PER_TOKEN
    is_measured: bool = False


class _Vocabulary:
    """The tokens of a tokenizer.json, read as JSON: what the rules need of a `tokenizers.Tokenizer`, without it."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = (facts.get("model") or {}).get("vocab") or {}
        pairs = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], n) for n, each in enumerate(vocabulary))
        )
        self._ids = {**dict(pairs), **{token["content"]: token["id"] for token in facts.get("added_tokens") or ()}}
        self._tokens = {number: token for token, number in self._ids.items()}

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary does not have it."""
        return self._ids.get(token)

    def id_to_token(self, number: int) -> str | None:
        """The token of an id."""
        return self._tokens.get(number)


def examine(path: str, separator: str | None, texts: Sequence[str]) -> TeacherFacts:
    """Reads the facts of a model from its files.

    Args:
        path: the model.
        separator: the separator that the user names; None takes it from the files.
        texts: texts on which the tokens are counted.

    Returns:
        The facts.

    Raises:
        ConfigError: the files do not tell the separator.
        ModelLoadError: there is no such model, or a file cannot be read.
    """
    with _files(path) as place:
        if place.suffix == ".gguf":
            return _gguf_facts(path, place, separator)
        return _folder_facts(path, place, separator, texts)


@contextlib.contextmanager
def _files(path: str) -> Iterator[Path]:
    """The local folder or .gguf file of a model; of a hub model, a temporary folder with the small files."""
    config = ModelConfig(path=path)
    if find_spec("tokenizers") is None:
        if not Path(path).expanduser().exists():
            raise ModelLoadError(
                f"--teacher: {path}: expected a folder or a .gguf file, found none; a hub name or package: path needs "
                f"pip install 'miniplm[score]'{did_you_mean(path)}"
            )
        yield Path(path).expanduser().absolute()
        return
    from miniplm_udf.scoring.model_files import files_here

    try:
        place = files_here(config)
    except MiniplmError as error:
        raise ModelLoadError(f"--teacher: {error}") from error
    if place is not None:
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _fetched(path, Path(folder))


def _fetched(name: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Not into the hub's cache: a model without its weights there would look damaged.
        return Path(snapshot_download(name, allow_patterns=_SMALL_FILES, local_dir=folder))
    except Exception as error:  # the errors of several HTTP clients
        raise ModelLoadError(
            f"--teacher: {name}: there is no such local folder (searched in {Path.cwd()}), and the hub does not give "
            f"it ({type(error).__name__}); correct the name, set HF_TOKEN for a gated model, or fetch it where there "
            f"is a network{did_you_mean(name)}"
        ) from error


def _folder_facts(path: str, folder: Path, named: str | None, texts: Sequence[str]) -> TeacherFacts:
    facts = _json(folder / "config.json")
    if not facts:
        raise ModelLoadError(f"--teacher: {folder}: expected a model folder with a config.json, found none")
    inner = facts.get("text_config")
    own: Json = inner if isinstance(inner, dict) else facts
    tokenizer = _tokenizer(folder)
    separator, reason, eos = _separator(folder, tokenizer, named)
    prefix, prefix_reason = _prefix(folder, tokenizer)
    per_token = _measured(tokenizer, texts)
    n_parameters = _n_parameters(folder, path)
    return TeacherFacts(
        path=_absolute(path),
        family=str(facts.get("model_type", "unknown")),
        n_parameters=n_parameters,
        n_ids=int(own.get("vocab_size") or 0),
        longest=own.get("max_position_embeddings", own.get("n_positions")),
        separator=separator,
        separator_reason=reason,
        prefix=prefix,
        prefix_reason=prefix_reason,
        dtype=str(own.get("dtype") or own.get("torch_dtype") or facts.get("dtype") or "not stated"),
        tuned=_tuned(path, eos, separator),
        quantised=_quantisation(facts),
        bytes_per_token=per_token or _BYTES_PER_TOKEN,
        is_measured=per_token is not None,
    )


def _gguf_facts(path: str, file: Path, named: str | None) -> TeacherFacts:
    from miniplm_udf.scoring.gguf_header import read_header
    from miniplm_udf.scoring.separators import default_separator

    facts = read_header(file)
    family = str(facts.get("general.architecture"))
    tokens = facts.get("tokenizer.ggml.tokens") or []

    def token_of(key: str) -> str | None:
        number = facts.get(f"tokenizer.ggml.{key}")
        return tokens[number] if isinstance(number, int) and number < len(tokens) else None

    eos, template = token_of("eos_token_id"), str(facts.get("tokenizer.chat_template") or "")
    has_token = set(tokens).__contains__
    separator, reason = _settled(
        lambda: named or default_separator(_ALIAS, eos, template, has_token), named, eos, has_token
    )
    adds_bos = facts.get("tokenizer.ggml.add_bos_token")
    file_type = facts.get("general.file_type")
    return TeacherFacts(
        path=_absolute(path),
        family=family,
        n_parameters=_gguf_parameters(facts, family, len(tokens)),
        n_ids=len(tokens),
        longest=facts.get(f"{family}.context_length"),
        separator=separator,
        separator_reason=reason,
        prefix=token_of("bos_token_id") if adds_bos else None,
        prefix_reason=f"tokenizer.ggml.add_bos_token is {adds_bos}".replace("None", "not set"),
        dtype="GGUF",
        tuned=_tuned(path, eos, separator),
        quantised="" if file_type in _UNQUANTISED else f"a GGUF file of type {_type_name(file_type)}",
    )


def _gguf_parameters(facts: Json, family: str, n_ids: int) -> int | None:
    """About how many weights a .gguf file has, from the sizes that it states."""
    names = (
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
    )
    sizes = [facts.get(f"{family}.{name}") for name in names]
    if not all(isinstance(size, int) and size for size in sizes):
        return None
    width, layers, inner, heads, groups = (int(size) for size in sizes if size is not None)
    return n_ids * width + layers * (2 * width * width * (1 + groups / heads) + 3 * width * inner).__ceil__()


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        raise ModelLoadError(
            f"--teacher: {folder}: expected a tokenizer.json next to the config.json, found none; save it there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if find_spec("tokenizers") is None:
        return _Vocabulary(folder)
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _separator(folder: Path, tokenizer: Any, named: str | None) -> tuple[str, str, str | None]:
    """The separator, where it is from, and the `eos_token`."""
    from miniplm_udf.scoring.separators import eos_token, find_separator

    eos = eos_token(folder, tokenizer)

    def find() -> str:
        return find_separator(_ALIAS, folder, tokenizer, ModelConfig(document_separator=named))[0]

    return *_settled(find, named, eos, lambda token: tokenizer.token_to_id(token) is not None), eos


def _type_name(file_type: Any) -> str:
    """The name of a value of general.file_type, such as Q4_1; the value if the package gguf does not tell."""
    with contextlib.suppress(ImportError, ValueError):
        from gguf import LlamaFileType

        return LlamaFileType(file_type).name.removeprefix("MOSTLY_")
    return str(file_type)


def _settled(
    find: Callable[[], str], named: str | None, eos: str | None, has_token: Callable[[str], bool]
) -> tuple[str, str]:
    """A separator and where it is from. If the eos_token ends a chat turn, the only other token that ends documents."""
    from miniplm_udf.scoring.separators import usual_separators

    try:
        return find(), "--separator" if named else "its eos_token, which ends no chat turn"
    except ConfigError as error:
        others = [token for token in usual_separators(has_token) if token != eos]
        if named is None and len(others) == 1:
            return others[0], f"the only usual one of its vocabulary, since its eos_token {eos} may end a chat turn"
        key = "models.teacher.document_separator"
        raise ConfigError(str(error).replace(f"set {key}", "name it with --separator TOKEN")) from error


def _prefix(folder: Path, tokenizer: Any) -> tuple[str | None, str]:
    from miniplm_udf.scoring.prefix import find_prefix

    prefix = find_prefix(_ALIAS, folder, tokenizer, ModelConfig())
    return prefix.token, prefix.reason


def _measured(tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Bytes of text in a token; None without a tokenizer that encodes, or without text."""
    sample = [text[:4000] for text in texts[:100] if text]
    if isinstance(tokenizer, _Vocabulary) or not sample:
        return None
    encoded = tokenizer.encode_batch(sample, add_special_tokens=False)
    return sum(len(text.encode("utf-8", "replace")) for text in sample) / max(1, sum(len(each.ids) for each in encoded))


def _n_parameters(folder: Path, path: str) -> int | None:
    from miniplm_udf.scoring.weights import n_parameters

    try:
        return n_parameters(folder)
    except MiniplmError as error:
        if Path(path).expanduser().exists():
            raise ModelLoadError(f"--teacher: {error}") from error
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # the errors of several HTTP clients: the number is not needed
        weights = HfApi().model_info(path).safetensors
        return int(weights.total) if weights is not None else None
    return None


def _tuned(path: str, eos: str | None, separator: str) -> str:
    if eos is not None and eos != separator:
        return f"its eos_token {eos} is not its document separator {separator}"
    match = _TUNED_NAME.search(Path(path).name)
    return f"its name has {match.group()!r}" if match else ""


def _quantisation(facts: Json) -> str:
    settings = facts.get("quantization_config")
    return f"quantization_config: {settings.get('quant_method', 'unknown')}" if isinstance(settings, dict) else ""


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


def _json(file: Path) -> Json:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
