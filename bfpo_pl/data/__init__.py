"""Data: from rows of real datasets to batches of pair trees."""
