"""What a text says of itself beside its scores: copies, benchmark text, language, quality; columns, no judgement."""
