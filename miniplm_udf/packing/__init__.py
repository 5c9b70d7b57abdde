"""The pack stage: makes token sequences of a fixed length for each student tokenizer.

`tokenizers.py` copies or trains the tokenizer, `sequences.py` joins texts to sequences (without Spark), `corpus.py`
runs both on Spark and writes `packed/<corpus>/<tokenizer>`.
"""
