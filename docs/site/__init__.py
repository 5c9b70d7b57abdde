"""Builds the documentation site: `python -m docs.site` copies the pages, writes the reference pages and runs Zensical.

`build.py` does the work; `configuration.py`, `commands.py` and `tables.py` each return one reference page, which is
generated from the code at every build and never committed; `parsers.py` reads the parsers of the command line, and
`markdown.py` writes tables and reads code blocks. Needs the extra `docs`; starts no Spark.
"""
