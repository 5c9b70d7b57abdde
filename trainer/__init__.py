"""The trainer: reads packed Delta tables, writes model folders and MLflow runs. Uses torch; no JVM, no Spark.

`__main__` (the command) calls `train` and the room `evaluation`; `train` calls `loop`, which calls `loss`, `schedule`,
`order` and `document_masks`.
Input and output are in `data` (Delta, Arrow), `checkpoint` (local disk), `records` (JSON files of a model folder) and
`tracking` (MLflow). The numeric modules (`loop`, `loss`, `schedule`, `order`, `document_masks`, `model`) import only
torch, transformers, numpy and the standard library.

`scaling_command` fits laws to finished runs: `scaling_runs` reads them from MLflow, `scaling` fits them (numpy and
scipy), and `scaling_plot` draws them.
"""
