"""Completions of a model: one batch, a queue of prompts through slots, or one text token by token.

Another way to decode is another file.
It may import `model`, `losses` and `system`; no file here imports an algorithm or a reward.
"""
