"""From input files to instances: readers, documents, chunking, and the deduplicating stream."""
