"""The score explorer: a local page over the tables of a corpus, for people who would rather look than write SQL.

`candidates.py` reads the tables with DuckDB; `server.py` draws the page and serves it on 127.0.0.1. No Spark.
"""
