"""Objectives as pure functions of arrays.

A loss comes in with its source and an outside value in its test.
It may import `system` alone; it knows no model, no batch and no config.
"""
