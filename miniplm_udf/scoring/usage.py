"""A scorer's token budget, FLOPs and memory, for the log and the driver. Plain data; loads nothing. Executor side."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ScorerUsage:
    """The state of a scorer.

    Attributes:
        place: kind of device and dtype, as `batch_size.place_of` names it.
        found_tokens_per_batch: token budget of a forward pass that this scorer searched, for later scorers at places of
            this name; None if it did not search, or if memory that others may have held ended the search.
        model_flops: model FLOPs of all forward passes so far; None if they are not known.
        peak_flops_per_second: peak of the device in the model's dtype; None if it is not known.
        memory_bytes: memory in use (`memory.memory_in_use`); None if it is not known.
        memory_total_bytes: memory that the GPU has; None on a CPU.
    """

    place: str
    found_tokens_per_batch: int | None
    model_flops: float | None
    peak_flops_per_second: float | None
    memory_bytes: int | None
    memory_total_bytes: int | None
