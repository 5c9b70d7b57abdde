"""Windows over a long input and batches of windows: index arithmetic only, no text and no torch.

Owns the two invariants of every score: each token is predicted exactly once, and each window is in exactly one batch.
Inputs are counts of tokens, outputs are index ranges. Driver or executor; pure, so a retry gives the same.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


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
    lengths: Sequence[int], tokens_per_batch: int, pass_tokens: int, at_least: int = 1, limit: int | None = None
) -> Iterator[list[int]]:
    """Groups the indices of windows of similar length, so that rows times the longest stays within a token budget.

    Of all groupings of the windows in the order of their lengths it takes the fastest: the one with the fewest tokens,
    padding among them, and `pass_tokens` for each batch. The longest windows come first, so that a batch that does not
    fit in memory shows at once. Windows of equal length keep their order.

    Args:
        lengths: tokens of each window.
        tokens_per_batch: the budget; a window above it is alone in its batch.
        pass_tokens: tokens that could be scored in the time that a forward pass takes whatever its size.
        at_least: windows that may share a batch whatever the budget; with 2 or more a batch of one window takes
            `pass_tokens` longer than its tokens and others do.
        limit: windows of at most this length do not share a batch with longer windows (`batching.length_limit`).

    Yields:
        Lists of indices into `lengths`; each index once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    n_long = 0 if limit is None else sum(length > limit for length in lengths)
    for group in (order[:n_long], order[n_long:]):
        sizes = [lengths[index] for index in group]
        start = 0
        for end in _ends(sizes, tokens_per_batch, pass_tokens, at_least):
            yield group[start:end]
            start = end


def _ends(sizes: list[int], tokens_per_batch: int, pass_tokens: int, at_least: int) -> list[int]:
    """Where the batches of the fastest grouping end.

    Args:
        sizes: tokens of each window, descending.
        tokens_per_batch: see `batches`.
        pass_tokens: see `batches`.
        at_least: see `batches`.
    """
    # cost[n]: the least tokens of a grouping of the first n windows, whose last batch starts at begin[n].
    cost, begin = np.full(len(sizes) + 1, np.inf), np.zeros(len(sizes) + 1, dtype=np.int64)
    cost[0] = 0.0
    for start, size in enumerate(sizes):
        most = min(max(1, at_least, tokens_per_batch // max(1, size)), len(sizes) - start)
        costs = cost[start] + pass_tokens + size * np.arange(1, most + 1, dtype=np.float64)
        if at_least > 1:
            costs[0] += pass_tokens
        reached = slice(start + 1, start + most + 1)
        # If two groupings cost the same, the one whose last batch is larger stays: it was found first.
        better = costs < cost[reached]
        cost[reached][better] = costs[better]
        begin[reached][better] = start
    ends = [len(sizes)] if sizes else []
    while ends and (start := int(begin[ends[-1]])) > 0:
        ends.append(start)
    return ends[::-1]
