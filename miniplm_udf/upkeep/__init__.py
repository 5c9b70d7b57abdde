"""What is done to a root afterwards: versions compared and restored, files removed, texts taken down, sums checked."""
