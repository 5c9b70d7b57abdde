"""Converts a .gguf file to a model folder: float32 safetensors, config.json and tokenizer.json.

Owns this node's cache of model folders, `<cache>/gguf/<sha256 of the file>-v<layout>/`: loading a GGUF takes 15 to 20
s, loading its folder less than 1 s. Input: a local .gguf file. Output: the folder. Executor side. If several processes
need the folder at once, one builds it and the others wait. It is built in a temporary folder and renamed, so that a
killed build leaves no folder; a retry builds it again.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring import gguf_facts, gguf_tokenizers
from miniplm_udf.scoring.loading import check_report
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE, load_tokenizer
from miniplm_udf.scoring.weights import SOURCE_FILE, sha256_of
from miniplm_udf.storage import Json

# Part of the folder's name: increase it when the content of the folder changes.
_LAYOUT = 3
# Values of general.file_type for tensors that are not quantised: F32, F16, BF16.
_UNQUANTISED = (0, 1, 32)


def gguf_folder(path: Path) -> Path:
    """The model folder of a .gguf file, built if this node's cache does not have it.

    A tokenizer.json next to the file is used as it is; without one the tokenizer is rebuilt from the file.

    Args:
        path: the .gguf file.

    Raises:
        ModelLoadError: transformers cannot read the file, or the folder would lose a fact that the file states.
    """
    from filelock import FileLock

    tokenizer = path.parent / TOKENIZER_FILE
    name = f"{sha256_of(path)}-v{_LAYOUT}" + (f"-{sha256_of(tokenizer)[:16]}" if tokenizer.is_file() else "")
    target = storage.cache_folder() / "gguf" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building."))
        try:
            _convert(path, staging)
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{path}: expected a .gguf file of a causal LM that transformers can read, found "
                f"{type(error).__name__}: {error}; give the model as a folder of safetensors instead"
            ) from error
        else:
            staging.chmod(0o755)
            os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(path: Path, folder: Path) -> None:
    """Checks the file and writes the folder; raises before the folder can reach the cache."""
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    file = gguf_facts.read_file(path)
    gguf_facts.refuse_what_is_no_model(file)
    _write_tokenizer(file, folder)
    config = _write_weights(file, folder)
    carried = gguf_facts.carried(file, config)
    config |= carried
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    gguf_facts.check_config(file, AutoConfig.from_pretrained(folder))
    record = _record(file) | {"carried": carried}
    (folder / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(file: gguf_facts.GgufFile, folder: Path) -> None:
    from transformers import AutoTokenizer

    path, pre = file.path, file.metadata.get(gguf_tokenizers.PRE_TOKENIZER)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre in gguf_tokenizers.DIGITS_APART:
        _split_digits(tokenizer.backend_tokenizer)
    if pre in gguf_tokenizers.WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    tokenizer.save_pretrained(folder)
    if (path.parent / TOKENIZER_FILE).is_file():
        shutil.copyfile(path.parent / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        gguf_tokenizers.check_vocabulary(file, load_tokenizer(folder))
    else:
        gguf_tokenizers.check_tokenizer(file, load_tokenizer(folder))


def _write_weights(file: gguf_facts.GgufFile, folder: Path) -> Json:
    """Writes model.safetensors; returns the content of config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model: Any
    model, report = AutoModelForCausalLM.from_pretrained(
        file.path.parent,
        gguf_file=file.path.name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(str(file.path), model, report)
    gguf_facts.check_tensors(file, model)
    # save_pretrained refuses a model from a GGUF. Like it, named_parameters() gives a tied weight once.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: Json = model.config.to_dict()
    config.pop("quantization_config", None)
    return config | {"architectures": [type(model).__name__], "dtype": "float32"}


def _record(file: gguf_facts.GgufFile) -> Json:
    file_type = file.metadata.get("general.file_type")
    return {
        "file": file.path.name,
        "sha256": sha256_of(file.path),
        "file_type": file_type,
        "quantised": file_type not in _UNQUANTISED,
        "pre_tokenizer": file.metadata.get(gguf_tokenizers.PRE_TOKENIZER),
        "add_bos_token": gguf_tokenizers.adds_bos(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
    }


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
