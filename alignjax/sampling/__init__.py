"""Completions of a model: one batch, a queue of prompts through slots, or one text token by token.

Another way to decode comes in as a file.
It may import `model`, `losses` and `system`; it knows no algorithm and no reward.
"""
