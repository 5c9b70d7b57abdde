"""MiniPLM on Spark: the library behind the jobs and the trainer.

Owns the tables' schemas, chunking, scoring, the Arrow UDF, refinement and corpus versions. Imports run one way:
errors, schemas, progress, storage -> config -> chunking, scoring -> udf -> tables, refine, corpora -> jobs.
Importing this package loads nothing heavy: no pyspark, no torch.
"""

__version__ = "0.1.0"
