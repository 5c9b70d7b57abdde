"""A fake model and a few instances for packaged_job.py. Goes to the workers alone, by --py-files."""

import datetime
from collections.abc import Sequence
from typing import Any

from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.results import Score


class PackagedScorer:
    def score(self, texts: Sequence[str], segment_ends: Any, ends_document: Any) -> list[Score]:
        return [Score(float(sum(text.encode())), len(text.split()), len(text.encode())) for text in texts]


class PackagedFactory:
    """Kept by its key, so that it also runs where scorers have a process of their own."""

    key = "packaged fake"

    def __call__(self) -> PackagedScorer:
        return PackagedScorer()


def describe() -> ModelDescription:
    return ModelDescription(
        model_id="teacher", tokenizer_hash="0" * 32, dtype="float32", context_tokens=64, window_overlap_tokens=0,
        context_prefix="none", document_separator="<s>", document_separator_id=0, prefix_token_id=None, vocab_size=2,
        n_parameters=1, weights_hash="fake", path="fake",
    )  # fmt: skip


def instance_rows() -> list[tuple[Any, ...]]:
    """Rows of `instances`, in the order of its columns."""
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    texts = [f"text {number} of a few words" for number in range(20)]
    return [
        (f"{number:032x}", f"{number:032x}", 0, [str(number)], 0, "web", text, [], True, True, len(text),
         f"{number:032x}", "pool", None, now, "0" * 32, 0)
        for number, text in enumerate(texts)
    ]  # fmt: skip
