"""A run as a directory: its config, its parts, its checkpoints, and the loaded run.

All code that writes to a run's directory, or reads from it, belongs here.
It may import `training` and the rooms below; it neither trains (`train`) nor measures (`evaluation`).
"""
