"""One iteration of training: the part without a gradient, the optimizer step, and their report.

Code that serves every algorithm belongs here; code of a single algorithm belongs to `algorithms`.
It may import `algorithms` and the rooms below; it reads no run's directory, and no config but its own sections.
"""
