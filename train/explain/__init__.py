"""Labels of latents from a language model on a server."""
