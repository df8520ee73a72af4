"""The commands of the command line, one file each, and the parts that several of them share.

A new command is a new file, with its options in `arguments` and its line in `cli`.
It may import every room and `train`; `cli` alone imports it.
"""
