"""Checks of the models before a command starts: files, kind, context, separator, prefix. Driver only, no Spark.

Input: a config and the aliases of the models that the command needs. Output: problems, each a sentence with its key and
its remedy. Reads config.json, tokenizer.json and the headers of weight files; reads no weights, fetches and converts
nothing, and needs neither torch nor transformers. A model that only executors may have is not looked for.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, MiniplmError
from miniplm_udf.similar_paths import did_you_mean
from miniplm_udf.storage import Json

# Ends of the names of classes that predict the next token.
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
# Types without a decoder, for a config.json that does not name a class.
_ENCODERS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
)  # fmt: skip
# Files from which transformers can make a tokenizer.json.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Packages without which transformers cannot load quantised weights, by method.
_QUANTISATION_PACKAGES = {"gptq": "optimum", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}
_HUB_SECONDS = 2.0


def is_local_session(config: ExperimentConfig) -> bool:
    """Whether executors certainly run on this machine, so that a file that is not here is nowhere.

    Args:
        config: the experiment.
    """
    # Under spark-submit, the master is not known before Spark starts.
    return (config.spark.master or "local").startswith("local") and "PYSPARK_GATEWAY_PORT" not in os.environ


def model_problems(config: ExperimentConfig, aliases: Sequence[str]) -> Iterator[str]:
    """Yields what is wrong with models.

    Args:
        config: the experiment.
        aliases: the models that the command needs; models that the experiment trains are left out.
    """
    if find_spec("tokenizers") is None:
        return  # the extra `score` is not installed here: executors have it
    for alias in aliases:
        model = config.models.get(alias)
        if model is not None and model.path is not None:
            yield from _model_problems(config, alias, model)
    yield from _twins(config, aliases)
    yield from _separator_of_reference(config)


def model_warnings(config: ExperimentConfig, aliases: Sequence[str]) -> Iterator[str]:
    """Yields document separators of the config that seem to end chat turns.

    Args:
        config: the experiment, in which `model_problems` finds nothing.
        aliases: the models that the command needs; a model that only executors have is left out.
    """
    if find_spec("tokenizers") is None:
        return
    for alias in aliases:
        model = config.models.get(alias)
        if model is not None and model.path is not None and model.document_separator is not None:
            with contextlib.suppress(MiniplmError):
                yield from _chat_warnings(alias, model, model.document_separator)


def _chat_warnings(alias: str, model: ModelConfig, separator: str) -> Iterator[str]:
    from miniplm_udf.scoring.separators import chat_doubt, chat_template, usual_separators

    folder = _folder_with_tokenizer(model)
    if folder is None:
        return
    has_token = _loaded(folder).get_vocab(with_added_tokens=True).__contains__
    if doubt := chat_doubt(separator, chat_template(folder), has_token):
        others = usual_separators(has_token)
        yield (
            f"models.{alias}.document_separator: {separator!r}{doubt}; if it did not end documents in pre-training, "
            "the losses of first tokens are wrong" + (f"; the vocabulary has {', '.join(others)}" if others else "")
        )


def has_no_prefix(config: ExperimentConfig, alias: str) -> bool:
    """Whether certainly no token stands in front of the texts that a model scores.

    Args:
        config: the experiment.
        alias: alias of a model.
    """
    model = config.models[alias]
    if model.context_prefix != "none" or find_spec("tokenizers") is None:
        return False
    if model.path is None:  # trained by this experiment, without a BOS
        return True
    from miniplm_udf.scoring.prefix import find_prefix

    try:
        folder = _folder_with_tokenizer(model)
        if folder is None:
            return False
        return find_prefix(alias, folder, _loaded(folder), model).token is None
    except MiniplmError:
        return False


def _twins(config: ExperimentConfig, aliases: Sequence[str]) -> Iterator[str]:
    """Models that are the same model, so that the difference of their scores is 0."""
    first: dict[ModelConfig, str] = {}
    for alias in aliases:
        model = config.models.get(alias)
        if model is None or model.path is None or alias not in config.scored_aliases:
            continue
        if (other := first.setdefault(model, alias)) != alias:
            yield (
                f"models.{alias}.path: is the same model as models.{other}.path, {model.path}, with the same settings: "
                "the difference of their scores is 0 for every text; name another model"
            )


def tokenizer_of(path: str, revision: str | None = None) -> Any:
    """Returns the tokenizer of a model or a folder, if it is on this machine.

    Args:
        path: the path of a model, or of a folder with a tokenizer.json.
        revision: commit of a hub model.

    Returns:
        The tokenizer; None if it is not here, or if it is in a .gguf file.

    Raises:
        ModelLoadError: the path does not exist, or the file cannot be read.
    """
    if find_spec("tokenizers") is None:
        return None
    folder = _folder_with_tokenizer(ModelConfig(path=path, revision=revision))
    return None if folder is None else _loaded(folder)


def _folder_with_tokenizer(model: ModelConfig) -> Path | None:
    """The folder of a model with its tokenizer.json; None if it is not here, or is a .gguf file.

    Raises:
        ModelLoadError: the path does not exist.
    """
    from miniplm_udf.scoring.model_files import files_here

    folder = files_here(model)
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


@functools.cache
def _loaded(folder: Path) -> Any:
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _model_problems(config: ExperimentConfig, alias: str, model: ModelConfig) -> Iterator[str]:
    from miniplm_udf.scoring.model_files import files_here, is_hub_name

    try:
        place = files_here(model)
        if place is not None and place.suffix == ".gguf":
            yield from _gguf_problems(alias, model, place)
        elif place is not None:
            yield from _folder_problems(config, alias, model, place)
        elif is_hub_name(str(model.path)) and not (config.root and storage.exists(config.layout.model_record(alias))):
            yield from _hub_problems(config, alias, model)
    except ConfigError as error:
        yield str(error)
    except MiniplmError as error:
        if is_local_session(config):
            yield f"models.{alias}.path: {error}"


def _hub_problems(config: ExperimentConfig, alias: str, model: ModelConfig) -> Iterator[str]:
    """Asks the hub whether it has a model that is not in the cache."""
    key = f"models.{alias}.path"
    try:
        names = _names_on_hub(config, key, model, f"there is no such local folder (searched in {Path.cwd()})")
    except ConfigError as error:
        yield f"{error}{did_you_mean(str(model.path))}"
        return
    if names and "config.json" not in names:
        yield f"{key}: {model.path}: expected a model with a config.json on the hub, found none; name another model"


def _names_on_hub(config: ExperimentConfig, key: str, model: ModelConfig, here: str) -> set[str]:
    """The names of a model's files on the hub.

    Args:
        config: the experiment.
        key: the key of the model's path.
        model: a model with the name of the hub.
        here: which of its files are on this machine, in words.

    Returns:
        The names; empty if they are not known here, and may be known where the executors are.

    Raises:
        ConfigError: the hub has no such model, does not give it, or cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    start = f"{key}: {model.path}: "
    try:
        info = HfApi().model_info(str(model.path), revision=model.revision, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise ConfigError(
            f"{start}the hub gives it to users who accepted its terms; accept them, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{start}{here}, and the hub has no such model; correct the name") from error
    except Exception as error:  # the errors of several HTTP clients
        if not is_local_session(config):
            return set()
        raise ConfigError(
            f"{start}{here}, and HF_HUB_OFFLINE forbids to ask the hub; correct the path, or unset HF_HUB_OFFLINE"
            if isinstance(error, OfflineModeIsEnabled)
            else f"{start}{here}, and the hub cannot be reached ({type(error).__name__}); correct the path, or fetch "
            "the model where there is a network"
        ) from error
    return {file.rfilename for file in info.siblings or ()}


def _folder_problems(config: ExperimentConfig, alias: str, model: ModelConfig, folder: Path) -> Iterator[str]:
    """Checks the folder of a model."""
    key = f"models.{alias}.path"
    if not (folder / "config.json").is_file():
        yield f"{key}: {folder}: expected a model folder with a config.json, found none; name the model's folder"
        return
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{key}: {folder}/config.json: expected JSON, found {error}; fetch the model again"
        return
    if (kind := _other_kind(facts)) is not None:
        yield (
            f"{key}: expected a causal LM, which predicts the next token, found {kind} in {folder}; name a causal LM "
            "(llama, qwen2, gpt2, mamba, ...)"
        )
        return
    missing = [*(_weight_problems(key, folder) if model.server is None else ()), *_tokenizer_problems(key, folder)]
    if not missing or not _will_be_fetched(config, key, model, folder):
        yield from missing
    if model.server is None and is_local_session(config):
        yield from _quantisation_problems(key, str((facts.get("quantization_config") or {}).get("quant_method")))
    if (folder / "tokenizer.json").is_file():
        yield from _token_problems(alias, model, folder, facts)


def _tokenizer_problems(key: str, folder: Path) -> Iterator[str]:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        yield (
            f"{key}: {folder}: expected a tokenizer.json next to the config.json, found no tokenizer; save it there "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )


def _will_be_fetched(config: ExperimentConfig, key: str, model: ModelConfig, folder: Path) -> bool:
    """Whether a folder of the hub's cache lacks files of the model, which the run fetches from the hub."""
    if Path(str(model.path)).expanduser().exists() or not storage.is_local(str(model.path)):
        return False
    names = _names_on_hub(config, key, model, "the hub's cache has only some of its files")
    needed = {name for name in names if name.endswith(".safetensors") or name in _TOKENIZER_FILES}
    return not names or any(not (folder / name).is_file() for name in needed)


def _other_kind(facts: Json) -> str | None:
    """The kind of a model that predicts no next token, in words; None for a causal LM."""
    model_type, classes = facts.get("model_type"), facts.get("architectures") or []
    if facts.get("is_encoder_decoder"):
        return f"an encoder with a decoder (model type {model_type})"
    is_encoder = model_type in _ENCODERS and not facts.get("is_decoder")
    if is_encoder or (classes and not any(str(name).endswith(_CAUSAL) for name in classes)):
        return f"{', '.join(map(str, classes)) or 'an encoder'} (model type {model_type})"
    return None


def _weight_problems(key: str, folder: Path) -> Iterator[str]:
    from miniplm_udf.scoring.weights import tensors

    try:
        tensors(folder)
    except MiniplmError as error:
        yield f"{key}: {error}"


def _quantisation_problems(key: str, method: str) -> Iterator[str]:
    """A package that transformers needs to load weights quantised by a method, and that is not installed."""
    package = _QUANTISATION_PACKAGES.get(method)
    if package is not None and find_spec(package) is None:
        yield (
            f"{key}: its weights are quantised by {method}, and transformers needs the package {package} to load them; "
            f"pip install {package.replace('_', '-')}, or name the model with its original weights"
        )


def _token_problems(alias: str, model: ModelConfig, folder: Path, facts: Json) -> Iterator[str]:
    """Checks the tokens that the config names, and the context."""
    from miniplm_udf.scoring.models import check_context
    from miniplm_udf.scoring.prefix import find_prefix
    from miniplm_udf.scoring.separators import find_separator, token_id
    from miniplm_udf.scoring.tokenizer_checks import check_every_byte, lost_differences

    tokenizer = _loaded(folder)
    text = facts.get("text_config") if isinstance(facts.get("text_config"), dict) else facts
    assert text is not None
    n_ids = text.get("vocab_size")
    longest = text.get("max_position_embeddings", text.get("n_positions"))
    bos: list[str] = []

    def check_bos() -> None:
        prefix = find_prefix(alias, folder, tokenizer, model)
        if prefix.token is not None:
            bos.append(prefix.token)
            token_id(f"models.{alias}.bos_token", prefix.token, tokenizer, n_ids)

    def check_separator() -> None:
        separator, _ = find_separator(alias, folder, tokenizer, model)
        token_id(f"models.{alias}.document_separator", separator, tokenizer, n_ids)

    def check_prefix() -> None:
        if model.context_prefix == "token":
            check_every_byte(alias, lost_differences(tokenizer))
            if model.prefix_token is not None:
                token_id(f"models.{alias}.prefix_token", model.prefix_token, tokenizer, n_ids)

    for check in (check_bos, check_separator, check_prefix):
        yield from _refused(check)
    yield from _refused(lambda: check_context(alias, model, longest, has_bos=bool(bos)))


def _refused(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield str(error)


def _gguf_problems(alias: str, model: ModelConfig, path: Path) -> Iterator[str]:
    """Checks the header of a .gguf file."""
    from miniplm_udf.scoring.gguf_facts import GgufFile, refuse_what_is_no_model
    from miniplm_udf.scoring.gguf_header import read_header
    from miniplm_udf.scoring.models import check_context
    from miniplm_udf.scoring.separators import default_separator

    file = GgufFile(path, read_header(path), {}, None)
    refuse_what_is_no_model(file)
    longest = file.fact("context_length")
    yield from _refused(lambda: check_context(alias, model, longest, has_bos=False))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or (path.parent / "tokenizer.json").is_file():
        return
    vocabulary, key = set(tokens), f"models.{alias}.document_separator"
    if model.document_separator is None:
        number = file.metadata.get("tokenizer.ggml.eos_token_id")
        eos = tokens[number] if isinstance(number, int) and number < len(tokens) else None
        template = str(file.metadata.get("tokenizer.chat_template") or "")
        yield from _refused(lambda: default_separator(alias, eos, template, vocabulary.__contains__))
    elif model.document_separator not in vocabulary:
        yield (
            f"{key}: expected one token of the vocabulary, found {model.document_separator!r}, which is not one; name "
            f"a token of {path.name}"
        )


def _separator_of_reference(config: ExperimentConfig) -> Iterator[str]:
    """A reference is trained on sequences with the separator of the model whose tokenizer it has."""
    if config.reference is None:
        return
    alias, origin = config.reference.alias, config.reference.tokenizer
    if not {alias, origin} <= config.models.keys():
        return
    own, other = config.models[alias].document_separator, config.models[origin].document_separator
    if config.models[alias].path is None and None not in (own, other) and own != other:
        yield (
            f"models.{alias}.document_separator: expected {other!r}, the separator of models.{origin}, with which this "
            f"experiment trains {alias}, found {own!r}; remove the key, and it takes that separator"
        )
