"""Worlds with a reward that is known: the testbed. No JAX.

Another environment comes in as a file or a folder.
It may import `data` and `system`; `rewards` names the testbed's gold, and so stands above.
"""
