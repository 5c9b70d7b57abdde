"""Scoring of text with a causal language model, in pure torch: no Spark, no Arrow.

Owns tokenizers (`tokenizer`), model folders and their descriptions (`models`, `gguf_cache`), windows (`windows`), the
language-model head without its logits (`head`), the inputs of a text (`inputs`) and the `Scorer` (`scorer`). Importing
this package loads nothing heavy: take the module you need.
"""
