"""The Delta tables and the JSON records of a root: how they are created, written and read.

The stages' rooms call these modules; no module here imports a stage or a streaming query. `tables.py` is the only
writer of Delta tables. Modules that the trainer imports (`delta_files`, `delta_log`, `model_records`,
`provenance`) need no Spark.
"""
