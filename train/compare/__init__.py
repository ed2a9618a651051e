"""Runs beside each other: how well they reconstruct, how far their latents repeat each other, what a step costs."""
