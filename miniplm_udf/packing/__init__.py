"""The pack stage: makes token sequences of a fixed length for each student tokenizer.

`tokenizers.py` copies or trains the tokenizer; `sequences.py` joins texts to sequences, and `generated.py` makes
sequences of generated token ids, both without Spark. `corpus.py` runs them on Spark, a shard at a time (`shards.py`),
and writes `packed/<corpus>/<tokenizer>`, whose files have the row groups and encodings of `file_layout.py`.
"""
