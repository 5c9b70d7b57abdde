"""Text to token ids, the same way everywhere: the raw `tokenizers` library on a folder's tokenizer.json.

Owns how corpus text is encoded: no truncation, no padding, no added special tokens, no sampling of merges (`dropout`, a
setting of tokenizer training), and text that spells a special token is ordinary text (`split_special_tokens` of
transformers). `tokenizer_checks` finds what a tokenizer drops from a text. Loads no model, no torch, no transformers.
Input: a local folder. Output: a `tokenizers.Tokenizer`; callers use `encode_batch(texts, add_special_tokens=False)`,
`.ids` and `.offsets` (in characters, untrimmed: the span of a token includes its spaces). Driver and executors; pure.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.scoring.tokenizer_checks import is_repeatable
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# BPE leaves out merges at random with `dropout`; Unigram draws a segmentation with `alpha` and `nbest_size`.
_SAMPLING = ("dropout", "alpha", "nbest_size")


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Returns a folder's tokenizer, set to encode raw corpus text.

    Args:
        folder: a local folder that holds tokenizer.json.

    Raises:
        ModelLoadError: there is no tokenizer.json, it cannot be parsed, or its tokens differ from call to call.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelLoadError(
            f"{path}: expected a tokenizer.json of the `tokenizers` library, found a file that it refuses ({error}); "
            f"save the tokenizer again with a current version"
        ) from error
    _switch_off_sampling(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    # Even without added tokens, a byte-level post-processor trims spaces off the offsets, which then have gaps.
    tokenizer.post_processor = None
    if not is_repeatable(tokenizer):
        raise ModelLoadError(
            f"{path}: expected the same tokens for the same text at every call, found different ones; remove the "
            f"setting of tokenizer training that samples them"
        )
    return tokenizer


def _switch_off_sampling(tokenizer: "Tokenizer") -> None:
    """Removes random choices: BPE skips merges with `dropout`, Unigram draws with `alpha` and `nbest_size`."""
    model = tokenizer.model
    for name in _SAMPLING:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def tokenizer_hash(folder: Path) -> str:
    """The hash of a folder's tokenizer.json, 32 hex digits.

    A model of this project's trainer has the hash of the tokenizer that its data was packed with, whose file the
    trainer may have changed (`without_additions`): the two encode corpus text alike.

    Args:
        folder: a local model folder.

    Raises:
        ModelLoadError: there is no tokenizer.json.
    """
    file_hash = content_hash(_tokenizer_file(folder).read_bytes())
    training = Path(folder) / TRAINING_FILE
    stated = json.loads(training.read_text(encoding="utf-8")) if training.is_file() else {}
    return str(stated["tokenizer_hash"]) if stated.get("tokenizer_file_hash") == file_hash else file_hash


def content_hash(content: bytes) -> str:
    """Hashes a tokenizer.json.

    A file with a `dropout` has another hash than its bytes: scores made of sampled tokens are not the same model's.

    Args:
        content: the bytes of the file.

    Returns:
        32 hex digits.
    """
    mark = b"without dropout" if _has_dropout(content) else b""
    return hashlib.sha256(content + mark).hexdigest()[:32]


def without_additions(content: bytes) -> bytes:
    """Returns a tokenizer.json with which plain use of the file encodes ordinary text as `load_tokenizer` does.

    Removes tokens that a post-processor adds (a BOS), truncation, padding, and sampling of merges. transformers follows
    the file there: with `add_bos_token: false` in tokenizer_config.json, a post-processor's BOS is still added. A file
    without these settings is returned as it is.

    Args:
        content: the bytes of a tokenizer.json.
    """
    from tokenizers import Tokenizer

    settings = json.loads(content)
    adds = Tokenizer.from_buffer(content).post_processor
    changes: Json = {name: None for name in ("truncation", "padding") if settings.get(name) is not None}
    if adds is not None and adds.num_special_tokens_to_add(False) > 0:
        changes["post_processor"] = _without_templates(settings["post_processor"])
    sampling = {name: None for name in _SAMPLING if settings["model"].get(name)}
    if sampling:
        changes["model"] = settings["model"] | sampling
    if not changes:
        return content
    return json.dumps(settings | changes, ensure_ascii=False, indent=2).encode("utf-8")


def _without_templates(processor: Json) -> Json | None:
    """The byte-level parts of a post-processor, which move offsets only; None if it has none."""
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_templates, processor["processors"]) if part is not None]
        return {**processor, "processors": kept} if kept else None
    return processor if processor["type"] == "ByteLevel" else None


def _has_dropout(content: bytes) -> bool:
    # Searched, not parsed, since a tokenizer.json may have 30 MB. A token "dropout" of the vocabulary has an integer.
    return re.search(rb'"dropout"\s*:\s*(0\.\d*[1-9]|1\.0|\d(\.\d+)?[eE]-)', content) is not None


def _tokenizer_file(folder: Path) -> Path:
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ModelLoadError(
            f"{folder}: expected a {TOKENIZER_FILE} in the folder, found none; a fast tokenizer is needed: save it "
            f"with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return path
