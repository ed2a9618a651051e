"""Labels of latents by a language model on a server."""
