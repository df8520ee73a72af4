"""Import and export of Hugging Face models: their configs, tensors, files and adapters.

Another family is another entry of `families`.
It may import the model and `system`; no other file of `model` imports it.
"""
