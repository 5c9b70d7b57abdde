"""The unit of a number, by its name: names of config keys and of columns state their units. Pure."""

import re

# The first pattern that a name matches gives the unit.
_UNITS = (
    (r"_word_ratio$", "for each word"),
    (r"_seconds$", "seconds"),
    (r"_bytes$|^split_bytes$", "bytes"),
    (r"(^|_)bytes_per_trigger$", "bytes, as 64m or 1g"),
    (r"bits_per_byte$", "bits per byte"),
    (r"_nats$|_nll_mean$", "nats"),
    (r"_tokens$|^tokens_per_batch$|^budget_tokens$|^sequence_length$", "tokens"),
    (r"_words$", "words"),
    (r"(^|_)steps$", "steps"),
    (r"^(batch|micro_batch)_sequences$", "sequences"),
    (r"(^|_)(ratio|share|sample|heldout|confidence|jaccard)$|^top_p$|^reference$|^threshold_share$", "share, 0 to 1"),
    (r"_at$", "UTC"),
    (r"^(low|high)$", "quantile, 0 to 1"),
    (r"^(workers|workers_per_gpu|requests|windows|shards|state_partitions|max_files_per_trigger)$", "count"),
    (r"^(keep_checkpoints|max_instances_per_source|shard_ranks|examples|rows|features|vocab_size)$", "count"),
    (r"^n_|_ngrams$", "count"),
)


def unit(name: str) -> str:
    """Returns the unit of a key or a column; empty if the name states none.

    Args:
        name: the last part of the key, or the name of the column.
    """
    return next((words for pattern, words in _UNITS if re.search(pattern, name)), "")
