"""Which latents are there twice by what they do: how much worse held-out rows are explained with one in their place."""
