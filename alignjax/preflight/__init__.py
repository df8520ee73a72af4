"""A run's needs of its machine, found by compiling each of its steps from shapes alone: no device, no arrays.

Every number is a compiler's estimate, never a measurement. Another chip is another row of `chip`.
It may import `evaluation` and the rooms below; its command is `compile`.
"""
