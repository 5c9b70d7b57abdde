"""Measures the scorer's peak memory in its own process: `python -m tests.support.memory_probe NAME`, a JSON line.

Peak: the highest resident set during `score` less the resident set before it (Linux: VmHWM, reset by clear_refs). The
models are thin and the vocabularies or texts large, so that what is measured is the scorer and not the model.
"""

import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORD_BYTES = 16
MIB = 1024 * 1024


def memory(name: str) -> int:
    """Bytes of VmRSS, VmHWM or VmSize of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """Runs the work; returns its result, and its peak memory in bytes above the memory in use before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = work()
    return result, memory("VmHWM") - before


def word_scorer(folder: Path, tokens_per_batch: int, vocab_size: int = 1024, **changes: Any) -> Any:
    """A one-layer Llama over words of a space and 15 digits, each word one token; every other byte is a token too."""
    from tests.support import tiny_models

    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    model_folder = tiny_models.make_model_folder(folder, "llama", **(sizes | changes))
    word_tokenizer().save(str(model_folder / "tokenizer.json"))
    return tiny_models.make_scorer(
        model_folder, tokens_per_batch, context_tokens=1024, window_overlap_tokens=128, context_prefix="token"
    )


def word_tokenizer() -> Any:
    """A byte-level BPE whose merges build each word from left to right. It loses no byte of any text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.support import tiny_models

    words = [word(number).replace(" ", "\u0120") for number in range(1, 256)]
    parts = sorted(
        {each[:end] for each in words for end in range(2, WORD_BYTES + 1)}, key=lambda part: (len(part), part)
    )
    tokens = [tiny_models.SEPARATOR, *sorted(pre_tokenizers.ByteLevel.alphabet()), *parts]
    merges = [(part[:-1], part[-1]) for part in parts]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


def word(number: int) -> str:
    return f" {number:0{WORD_BYTES - 1}d}"


def text_of(n_words: int, seed: int = 0) -> str:
    return "".join(word(1 + (seed + number * 7919) % 255) for number in range(n_words))


def score(scorer: Any, texts: list[str]) -> list[Any]:
    return list(scorer.score(texts, [[]] * len(texts), [True] * len(texts)))


def vocabulary(folder: Path) -> dict[str, Any]:
    """152k entries: one window of 1,024 tokens, and a batch of eight."""
    scorer = word_scorer(folder, 8 * 1024, vocab_size=152_064)
    score(scorer, [text_of(10)])
    one, peak_of_one = peak_of(lambda: score(scorer, [text_of(1024)]))
    eight, peak_of_eight = peak_of(lambda: score(scorer, [text_of(1024, seed) for seed in range(8)]))
    return {
        "n_tokens": [one[0].n_tokens, *(found.n_tokens for found in eight)],
        "peak_of_one": peak_of_one,
        "peak_of_eight": peak_of_eight,
        "logits_of_one": 1024 * 152_064 * 4,
    }


def corpus(folder: Path) -> dict[str, Any]:
    """A corpus and one of ten times its size, each in one call."""
    scorer = word_scorer(folder, 4096)
    small = [text_of(200, seed) for seed in range(500)]
    large = [text_of(200, seed) for seed in range(5000)]
    score(scorer, small)
    found, peak_of_small = peak_of(lambda: score(scorer, small))
    more, peak_of_large = peak_of(lambda: score(scorer, large))
    return {
        "n_tokens": [sum(one.n_tokens for one in found), sum(one.n_tokens for one in more)],
        "peak_of_small": peak_of_small,
        "peak_of_large": peak_of_large,
        "bytes_of_large": sum(map(len, large)),
    }


def document(folder: Path) -> dict[str, Any]:
    """A document of 50 MB between two of one word."""
    scorer = word_scorer(folder, 32 * 1024)
    n_words = 50 * MIB // WORD_BYTES
    text = text_of(n_words)
    score(scorer, [text_of(5000)])
    found, peak = peak_of(lambda: score(scorer, [word(1), text, word(1)]))
    return {
        "n_words": n_words,
        "n_tokens": [one.n_tokens for one in found],
        "n_bytes": [one.n_bytes for one in found],
        "neighbours": [found[0].nll_sum_nats, found[2].nll_sum_nats],
        "peak": peak,
    }


def limit(folder: Path) -> dict[str, Any]:
    """Allocations that really fail: an address space with room for a batch of some texts, and not of all."""
    scorer = word_scorer(folder, 1024 * 1024, intermediate_size=4096)
    texts = [text_of(300, seed) for seed in range(64)]
    small = [one for text in texts for one in score(scorer, [text])]
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 200 * MIB, resource.RLIM_INFINITY))
    import logging

    halved: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: halved.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("miniplm.scorer").addHandler(handler)
    found = score(scorer, texts)
    worst = max(abs(one.nll_sum_nats - other.nll_sum_nats) / 300 for one, other in zip(found, small, strict=True))
    return {"n_tokens": [one.n_tokens for one in found], "worst": worst, "halved": len(halved)}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        os.environ["MINIPLM_CACHE"] = f"{made}/cache"
        print(json.dumps(globals()[sys.argv[1]](Path(made))))
