"""The scoring stage on Spark: scores every instance with every model, and joins the scores to one row per instance.

Reads `instances`; writes `scores`, `rejects`, `score_matrix` and `<root>/models/<alias>.json`. The numbers are computed
by `scoring/` (torch) in processes that `workers/` starts on the executors.
"""
