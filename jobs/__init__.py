"""Entry points: one file for each command of `miniplm`, which spark-submit runs too. The work is in `miniplm_udf`."""
