"""Scoring and generation of text with a causal language model, in pure torch: no Spark, no Arrow.

Owns the `Scorer` (`scorer`) and the `Generator` (`generator`), with a text's inputs (`inputs`), windows (`windows`) and
results (`results`). What they need from a model's files: tokenizers (`tokenizer`, `tokenizer_checks`), folders and
their descriptions (`models`, `description`), the token in front of texts (`prefix`, `prefix_probe`), weight files
(`weights`), the check that a model loads whole (`loading`), .gguf files (`gguf_models`, `gguf_facts`,
`gguf_tokenizers`). How they compute: the language-model head without its logits (`head`), faster attention
(`attention`), layers on a CPU (`cpu`), several GPUs (`device_maps`), which windows share a batch (`batching`), errors
of a full memory (`memory`), the count of operations (`flops`). Importing this package loads nothing heavy: import the
module that you need. Executor side; a retry gives the same numbers.
"""
