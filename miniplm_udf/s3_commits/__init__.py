"""Java classes for Delta's log and for checkpoints of streams on S3, and the jar that holds them. No Python.

`ConditionalPutLogStore` makes a commit fail if another driver has committed the same version. `make s3-jar` compiles
them; the jar also holds the sources that it was made from.
"""
