"""The quality of preference data: how far the annotators of one thing agree.

Numbers of arrays of labels; NumPy alone. It may import `system` and the rest of `data`.
"""
