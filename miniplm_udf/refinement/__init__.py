"""What to keep: candidates of the matrix, expressions over them, exact cuts, and corpora that grow as scores come."""
