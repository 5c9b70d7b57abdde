"""The estimate command: time, bytes and tokens of an experiment, from a sample of its input.

`sample.py` draws the sample, `measure.py` counts and times it on an executor, `table_bytes.py` measures rows of the
tables, `estimate.py` scales all of this to the whole input, `results.py` holds the result. Writes nothing under the
root.
"""
