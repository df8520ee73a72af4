"""Measures of a trained model: preference accuracy, calibration, win rate, KL, the testbed's gold reward.

Every measure has an interval, made by `interval`.
It may import `runs` and the rooms below; it writes nothing.
"""
