"""The score explorer: a local page over the tables of a corpus, for people who would rather look than write SQL.

`candidates.py` reads the tables with DuckDB, `page.py` draws a page, `server.py` serves it on 127.0.0.1. No Spark.
"""
