"""Windows over a long input and batches of windows: index arithmetic only, no text and no torch.

Owns the two invariants that a score rests on: every token is predicted exactly once, and every window lands in exactly
one batch. Inputs are counts of tokens, outputs index ranges. Driver or executor; pure generators, so a retry repeats
them.
"""

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Window:
    """One forward pass over input tokens `start` to `end - 1`; predictions count from `first_scored` on."""

    start: int
    first_scored: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def windows(n_tokens: int, context: int, overlap: int) -> Iterator[Window]:
    """Cuts an input of `n_tokens` into windows of at most `context`, in which each input token predicts once.

    Consecutive windows share `overlap` tokens: context for the later one, whose predictions were made by the earlier.

        windows(10, context=4, overlap=1)      input token: 0 1 2 3 4 5 6 7 8 9
          Window(0, 0, 4)                                   P P P P
          Window(3, 4, 7)                                         . P P P           P predicts its successor
          Window(6, 7, 10)                                              . P P P     . is context only

    Args:
        n_tokens: length of the input (one less than the tokens of the text, as the last predicts nothing).
        context: longest window, tokens.
        overlap: shared tokens, 0 to context - 1.

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


def batches(lengths: Sequence[int], tokens_per_batch: int, at_least: int = 1) -> Iterator[list[int]]:
    """Groups indices of windows of like length so that rows times the longest stays within a token budget.

    Longest first, so that what does not fit in memory shows at once. Equal lengths keep their order.

    Args:
        lengths: tokens of each window.
        tokens_per_batch: budget; a window above it is alone in its batch.
        at_least: windows of a batch, whatever the budget.

    Yields:
        Lists of indices into `lengths`; each index once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if len(batch) >= at_least and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
