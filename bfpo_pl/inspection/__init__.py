"""`bfpo data`: looks at the data that a config names, without a model's weights, a trainer or a run folder."""
