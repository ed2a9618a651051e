"""The sparse half of a step: differentiable operations on (row, latent, value) triples.

With k of d_sae latents active, decode and every gradient cost the active pairs. `plain` is torch alone and runs on any
device; `compiled` is for CPU, on the loops of `loops`. Both give the same functions, and tests compare them.
"""
