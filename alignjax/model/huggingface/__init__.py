"""Models of Hugging Face's: their configs, tensors, files and adapters, in and out.

Another family comes in as an entry of `families`.
It may import the model and `system`; no other file of `model` imports it.
"""
