"""A run as a directory: its config, its parts, its checkpoints, and the run itself, loaded.

What is written into a run's directory, or read from one, comes in here.
It may import `training` and the rooms below; it neither trains (`train`) nor measures (`evaluation`).
"""
