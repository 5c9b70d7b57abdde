"""Evaluates trained models: `run` on held-out texts, external texts and tasks; `during_training` while a model trains.

`texts` reads the sets, `losses` scores them, `tasks` runs lm-eval, `records` owns `evaluation.json` and the names of
the metrics.
"""
