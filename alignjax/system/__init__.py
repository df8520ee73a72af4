"""What a program needs of its machine: devices, hosts, memory, files, versions; and the ranges of numbers.

What would be the same in a package of another subject comes in here.
It may import `types` and `errors` alone.
"""
