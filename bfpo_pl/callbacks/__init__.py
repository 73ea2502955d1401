"""Callbacks of a run: its record, its export, its guards and its evaluation."""
