"""Scoring of text with a causal language model, in pure torch: no Spark, no Arrow.

Owns tokenizers (`tokenizer`, `tokenizer_checks`), model folders and their descriptions (`models`, `description`), the
token in front of texts (`prefix`), the weight files (`weights`) and the check that a model loads whole (`loading`),
.gguf files (`gguf_models`, `gguf_facts`, `gguf_tokenizers`), windows (`windows`), the language-model head without its
logits (`head`), the inputs of a text (`inputs`), its results (`results`) and the `Scorer` (`scorer`). Importing this
package loads nothing heavy: import the module that you need. Executor side; a retry gives the same numbers.
"""
