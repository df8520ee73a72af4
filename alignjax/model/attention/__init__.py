"""Attention: what a layer computes (`form`), the choice (`attention`), and the kernels `splash` and `cudnn`.

Another kernel comes in as a file, which `attention` chooses.
It may import `system`; nothing of it knows the decoder.
"""
