"""Parts of `benchmarks/step.py`: the work that is timed, who does it, and how it is measured and shown."""
