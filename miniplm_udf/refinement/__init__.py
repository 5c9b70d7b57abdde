"""Which instances a corpus keeps: candidates, SQL over them, exact cuts, and corpora that grow with the scores."""
