"""One iteration: the part without a gradient, the optimizer step, and what is reported of them.

What holds for every algorithm comes in here; what is one algorithm's own belongs to `algorithms`.
It may import `algorithms` and the rooms below; it knows no run's directory and no config but its own sections.
"""
