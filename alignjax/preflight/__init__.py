"""What a run would need of its machine, found by compiling each of its steps from shapes alone: no device, no arrays.

Every number is a compiler's estimate, never a measurement.
"""
