"""What a verb of the command line does, one file a verb; and what several verbs share.

A new verb comes in as a file, with its options in `arguments` and its line in `cli`.
It may import every room and `train`; `cli` alone imports it.
"""
