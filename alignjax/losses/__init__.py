"""Objectives as pure functions of arrays.

Another loss needs its source, and a value from elsewhere in its test.
It may import `system` alone; no file here imports a model, a batch or a config.
"""
