"""What a run would need of its machine, found by compiling each of its steps from shapes alone: no device, no arrays.

Every number is a compiler's estimate, never a measurement. A chip comes in as a row of `chip`.
It may import `evaluation` and the rooms below; of the commands it is `compile`.
"""
