"""The pre-trainer: packed Delta tables in, model folders and MLflow runs out. Torch, no JVM, no Spark.

Reading goes downwards: `__main__` (command) -> `train`, `evaluate` -> `loop` -> `loss`, `schedule`, `order`; at the
edges `data` (Delta, Arrow), `checkpoint` (local disk) and `tracking` (MLflow). The maths (`loop`, `loss`, `schedule`,
`order`, `model`) imports torch, transformers, numpy and the standard library alone.
"""
