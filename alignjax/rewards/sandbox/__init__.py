"""Rewards in processes of their own: `isolation` for Python that may hang, `sandbox` for generated code.

`cell` is the program that runs generated code; it imports nothing of the package.
It may import `rewards.protocol`; it needs no JAX.
"""
