"""Sweeps: the trials of a W&B sweep file, run on this machine and on others that see the same folder."""
