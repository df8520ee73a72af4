"""Attention: what a layer computes (`form`), the choice (`attention`), and the kernels `splash` and `cudnn`.

Another kernel is another file, which `attention` chooses.
It may import `system`; no file here imports the decoder.
"""
