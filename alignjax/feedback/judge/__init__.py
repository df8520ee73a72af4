"""Judges: models and rules that compare completions, or grade them, by a rubric.

Reading order: rubric (what is asked), verdict (how an answer is read), judge (who answers, by name: rule, local,
endpoint), pairwise (both orders of two completions as one label), score (grades), bias and agreement (whether to trust
it). It may import `evaluation` and the rooms below; answers are written by `commands`.
"""
