"""Models: where networks come from, what of them trains, and the log-probs of responses."""
