"""bfpo_pl: Bi-Factorial Preference Optimization on Lightning."""

__version__ = "0.1.0"
