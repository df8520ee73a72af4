"""Records that people, models and rules make of completions: comparisons, and the pairs that follow from them.

Reading order: comparison (the one record), then judge/ (a model or a rule that compares or grades).
It may import `evaluation` and the rooms below; what writes files is in `commands`.
"""
