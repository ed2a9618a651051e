"""Detect and penalise redundant latents, by decoder cosine similarity and by co-activation."""
