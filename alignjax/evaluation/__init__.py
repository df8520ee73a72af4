"""What a trained model is worth: preference accuracy, calibration, win rate, KL, the testbed's gold reward.

A number comes in with its interval, which is `interval`'s.
It may import `runs` and the rooms below; it writes nothing.
"""
