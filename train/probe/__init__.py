"""What latents mean, by labels of the store's own tokens: no LLM is asked."""
