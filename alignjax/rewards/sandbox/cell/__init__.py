"""The program that runs generated code: `python -I cell`, started by `sandbox.py`. Nothing of the package is imported.

Reading order: program (three processes: one that waits, one for the tests, one for the code), kernel (their isolation),
wire (values between the two), peer (calls between the two), code_side, test_side.
"""
