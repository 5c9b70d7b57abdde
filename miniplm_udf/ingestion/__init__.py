"""The ingest stage: turns input files or a Delta table into the tables `instances` and `rejects`, as a stream."""
