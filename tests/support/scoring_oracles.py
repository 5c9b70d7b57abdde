"""Expected scores, computed in another way than in `miniplm_udf.scoring`: slow, and plain to read.

Owns the oracle of the arithmetic (docs/scoring.md): ids from transformers' own tokenizer class, windows from a
formula, -log p from the plain transformers model, fed one prefix at a time. Imports torch, transformers and numpy
alone, so that tests/gpu runs where nothing else is installed. Nothing here calls the code under test.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

SMILEY = "😀"
# Text, segment ends (UTF-8 bytes), ends_document: one document, several, parts of one, and characters of up to four
# bytes at every border. The windows of tests are 24 tokens long: x * 70 and the fox take several.
Row = tuple[str, list[int], bool]
ROWS: list[Row] = [
    ("hello world", [], True),
    ("the quick brown fox jumps over the lazy dog. " * 2, [], False),
    (f"é{SMILEY} first.second ünd", [12], True),
    ("x" * 70, [30, 50], True),
    ("text that spells <|endoftext|> and <|im_end|>", [], True),
    ("a", [], True),
    ("  a  b\n\n", [], False),
    (f"{SMILEY}终{SMILEY}", [4, 7], False),
    (f"{SMILEY * 9}é", [], True),
    ("ab", [0, 1], True),
]
CONTEXT, OVERLAP = 24, 6


@dataclasses.dataclass(frozen=True)
class Expected:
    """Sum of -log p in nats, scored tokens, and UTF-8 bytes of the characters that scored tokens cover whole."""

    nll_sum_nats: float
    n_tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Ids of a text; of each id, whether its prediction counts, and the UTF-8 bytes of text that it stands for."""

    ids: list[int]
    counts: list[bool]
    n_bytes: list[int]


def plain_tokenizer(folder: Path) -> Any:
    """transformers' own tokenizer of a folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))


def plain_model(folder: Path, device: str = "cpu") -> Any:
    """transformers' own model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def sequence(tokenizer: Any, row: Row, separator: int, prefix: int | None) -> Sequence:
    """The ids that a row stands for under either arithmetic.

    Args:
        tokenizer: of `plain_tokenizer`, byte-level: the characters of a token's string are its bytes.
        row: text, segment ends, ends_document.
        separator: id of the end-of-document token.
        prefix: id of the token in front, None for the official arithmetic.
    """
    text, ends, ends_document = row
    raw = text.encode()
    ids: list[int] = [] if prefix is None else [prefix]
    n_bytes, inserted = [0] * len(ids), [True] * len(ids)
    for number, (left, right) in enumerate(zip([0, *ends], [*ends, len(raw)], strict=True)):
        segment = raw[left:right].decode()
        own = tokenizer(segment, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += own
        n_bytes += [len(token) for token in tokenizer.convert_ids_to_tokens(own)]
        inserted += [False] * len(own)
        if number < len(ends) or ends_document:
            ids.append(separator)
            n_bytes.append(0)
            inserted.append(True)
    if prefix is None:
        counts = [index > 0 and ids[index - 1] != separator for index in range(len(ids))]
    else:
        counts = [not put_there for put_there in inserted]
    return Sequence(ids, counts, n_bytes)


def window_start(predictor: int, context: int, overlap: int) -> int:
    """First token of the window in which token number `predictor` predicts the one behind it."""
    if predictor < context:
        return 0
    return ((predictor - context) // (context - overlap) + 1) * (context - overlap)


def covered_bytes(text: str, made: Sequence) -> int:
    """UTF-8 bytes of the characters of which every byte stands in a token that counts."""
    by_byte = [counts for counts, n_bytes in zip(made.counts, made.n_bytes, strict=True) for _ in range(n_bytes)]
    assert len(by_byte) == len(text.encode())
    covered, position = 0, 0
    for character in text:
        width = len(character.encode())
        covered += width * all(by_byte[position : position + width])
        position += width
    return covered


@torch.inference_mode()
def brute_force(
    model: Any,
    tokenizer: Any,
    row: Row,
    *,
    separator: int = 0,
    prefix: int | None = None,
    bos: int | None = None,
    context: int = CONTEXT,
    overlap: int = OVERLAP,
) -> Expected:
    """Scores a row one token at a time: each prefix alone through the plain model, the last logits in float64.

    A BOS stands in front of every window, and does not change which tokens count.
    """
    made = sequence(tokenizer, row, separator, prefix)
    device = next(model.parameters()).device
    total, n_tokens = 0.0, 0
    for target in range(1, len(made.ids)):
        if made.counts[target]:
            start = window_start(target - 1, context, overlap)
            # With `context_prefix: token` the text may begin with the BOS by itself.
            front = [] if bos is None or (start == 0 and prefix == bos) else [bos]
            logits_V = model(torch.tensor([front + made.ids[start:target]], device=device)).logits[0, -1].double()
            total -= float(torch.log_softmax(logits_V, dim=-1)[made.ids[target]])
            n_tokens += 1
    return Expected(total, n_tokens, covered_bytes(row[0], made))


def score(scorer: Any, rows: list[Row]) -> list[Any]:
    """The scorer's results for some rows."""
    return list(scorer.score([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]))
