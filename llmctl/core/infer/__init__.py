"""Inference: the sampler, the one generate loop, beam search, the batch job. Knows no training and no terminal.

Nothing here imports torch at module level except `torch_executor`, so that another executor can do without it.
"""
