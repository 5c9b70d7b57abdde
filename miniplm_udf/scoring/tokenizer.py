"""Text to token ids, the same way everywhere: the raw `tokenizers` library on a folder's tokenizer.json.

Owns how corpus text is encoded: no truncation, no padding, no added special tokens, and text that spells a special
token is ordinary text (`split_special_tokens` of transformers). Refuses models: neither torch nor transformers is
loaded. Input: a local folder. Output: a `tokenizers.Tokenizer`; callers use
`encode_batch(texts, add_special_tokens=False)`, `.ids` and `.offsets` (in characters, untrimmed: a token's span
includes its spaces). Driver and executors; pure.
"""

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from miniplm_udf.errors import ModelLoadError

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, set to encode raw corpus text.

    Args:
        folder: a local folder that holds tokenizer.json.

    Raises:
        ModelLoadError: if there is no tokenizer.json, or it cannot be parsed.
    """
    path = _tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelLoadError(
            f"{path}: expected a tokenizer.json of the `tokenizers` library, found a file that it refuses ({error}); "
            f"save the tokenizer again with a current version"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    # Without added tokens a post-processor does one thing more: byte-level ones trim spaces off the offsets, which then
    # no longer tile the text.
    tokenizer.post_processor = None
    return tokenizer


def tokenizer_hash(folder: Path) -> str:
    """32 hex digits over the bytes of tokenizer.json.

    Raises:
        ModelLoadError: if there is no tokenizer.json.
    """
    return hashlib.sha256(_tokenizer_file(folder).read_bytes()).hexdigest()[:32]


def _tokenizer_file(folder: Path) -> Path:
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ModelLoadError(
            f"{folder}: expected a {TOKENIZER_FILE} in the folder, found none; a fast tokenizer is needed: save it "
            f"with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return path
