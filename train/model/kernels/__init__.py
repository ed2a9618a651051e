"""The sparse half of a step: selection, and differentiable operations on (row, latent, value) triples.

With k of d_sae latents active, decode and every gradient cost the active pairs. The same functions come in several
forms, which tests compare: `dense` is the mathematics as it is written, the reference; `plain` is torch alone, on any
device; `compiled` is for CPU, on the loops of `loops`; `triton_kernels` is for CUDA.
"""
