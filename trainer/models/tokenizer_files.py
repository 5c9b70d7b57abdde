"""The tokenizer files of a trained model: a user's tokenizer must encode a text as the packed data did.

Reads the files of `<root>/models/tokenizer_<name>/`, which the pack stage wrote; makes the files of the model's folder.
Packed data has no BOS and no other token that a tokenizer.json may add, so the saved file has no such setting either
(`scoring.tokenizer.without_additions`). `training.json` has the hashes of both files; scores of the model use the
tokenizer of the packed data. Runs on rank 0; writes only local files.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE, content_hash, load_tokenizer, without_additions

LOGGER = logging.getLogger("miniplm.trainer.tokenizer_files")

_CONFIG_FILE = "tokenizer_config.json"
# Pre-tokenizers and normalizers differ in digits, apostrophes, spaces, line breaks and combining accents.
_SAMPLE = "In 2024, 12345 of them: it's IT'S e\u0301 \u6771\u4eac \U0001f600\n\n\n\tdef f(x):  return (x ---- 1)  \n"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer folder.

    Attributes:
        packed: content of the tokenizer.json that the data was packed with.
        config: content of tokenizer_config.json, for transformers.
    """

    packed: bytes
    config: bytes

    @property
    def packed_hash(self) -> str:
        """Hash of the tokenizer.json that the data was packed with."""
        return content_hash(self.packed)

    @property
    def saved_hash(self) -> str:
        """Hash of the tokenizer.json that `write` writes."""
        return content_hash(without_additions(self.packed))

    def write(self, folder: Path) -> None:
        """Writes both files into a local folder, with a tokenizer.json that adds no token to a text.

        Args:
            folder: a local folder, which must exist.
        """
        (folder / TOKENIZER_FILE).write_bytes(without_additions(self.packed))
        (folder / _CONFIG_FILE).write_bytes(self.config)


def read_tokenizer_files(uri: str) -> TokenizerFiles:
    """Reads the files of the tokenizer folder at a URI, byte for byte.

    Args:
        uri: path or URI of the folder.

    Raises:
        CorpusError: one of the two files is missing.
    """
    contents = []
    for name in (TOKENIZER_FILE, _CONFIG_FILE):
        try:
            with fsspec.open(storage.join(uri, name), "rb") as handle:
                contents.append(handle.read())
        except FileNotFoundError as error:
            raise CorpusError(
                f"{storage.redact(uri)}: expected the tokenizer of the packed data, found no {name}; restore the file, "
                "or delete the folder and run the pack stage"
            ) from error
    return TokenizerFiles(*contents)


def check_auto_tokenizer(folder: Path, name: str) -> None:
    """Logs a warning if `AutoTokenizer` encodes a sample text differently from the model's packed data.

    For some model types (qwen2, qwen3_5) transformers uses a class that reads only the vocabulary of tokenizer.json
    and splits words in its own way, whatever tokenizer_config.json says.

    Args:
        folder: local folder of the model.
        name: name of the model, for the message.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer(_SAMPLE)["input_ids"] != load_tokenizer(folder).encode(_SAMPLE, add_special_tokens=False).ids:
        LOGGER.warning(
            "%s: AutoTokenizer uses %s for this model type, which encodes texts differently from the data that the "
            "model was trained on; load the tokenizer with PreTrainedTokenizerFast.from_pretrained",
            name,
            type(tokenizer).__name__,
        )
