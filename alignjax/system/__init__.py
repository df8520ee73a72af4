"""A program's access to its machine: devices, hosts, memory, files, versions; and the ranges of numbers.

Code that a package of another subject could use unchanged comes in here.
It may import `types` and `errors` alone.
"""
