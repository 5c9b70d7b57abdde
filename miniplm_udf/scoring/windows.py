"""Windows over a long input and batches of windows: index arithmetic only, no text and no torch.

Owns the two invariants of every score: each token is predicted exactly once, and each window is in exactly one batch.
Inputs are counts of tokens, outputs are index ranges. Driver or executor; pure generators, so a retry gives the same.
"""

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Window:
    """The input tokens of one forward pass, `start` to `end - 1`; predictions count from `first_scored` on."""

    start: int
    first_scored: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def windows(n_tokens: int, context: int, overlap: int) -> Iterator[Window]:
    """Cuts an input of `n_tokens` into windows of at most `context`, in which each input token predicts once.

    Consecutive windows share `overlap` tokens. They are only context in the later window; the earlier one scored them.

        windows(10, context=4, overlap=1)      input token: 0 1 2 3 4 5 6 7 8 9
          Window(0, 0, 4)                                   P P P P
          Window(3, 4, 7)                                         . P P P           P predicts its successor
          Window(6, 7, 10)                                              . P P P     . is context only

    Args:
        n_tokens: length of the input: one less than the tokens of the text, since the last token predicts nothing.
        context: length of the longest window, in tokens.
        overlap: tokens that consecutive windows share, 0 to context - 1.

    Yields:
        Windows in order; none for an empty input.
    """
    assert 0 <= overlap < context, (context, overlap)
    end = min(n_tokens, context)
    if n_tokens > 0:
        yield Window(0, 0, end)
    while end < n_tokens:
        start, first_scored = end - overlap, end
        end = min(n_tokens, start + context)
        yield Window(start, first_scored, end)


def batches(
    lengths: Sequence[int], tokens_per_batch: int, at_least: int = 1, limit: int | None = None
) -> Iterator[list[int]]:
    """Groups the indices of windows of similar length, so that rows times the longest stays within a token budget.

    The longest windows come first, so that a batch that does not fit in memory shows at once. Windows of equal length
    keep their order.

    Args:
        lengths: tokens of each window.
        tokens_per_batch: the budget; a window above it is alone in its batch.
        at_least: fewest windows in a batch, whatever the budget.
        limit: windows of at most this length do not share a batch with longer windows (`batching.length_limit`).

    Yields:
        Lists of indices into `lengths`; each index once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        is_full = len(batch) >= at_least and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch
        crosses_limit = limit is not None and batch and lengths[batch[0]] > limit >= lengths[index]
        if is_full or crosses_limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
