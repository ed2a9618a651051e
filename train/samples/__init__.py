"""Samples: for every latent, contexts in which it is active, in a columnar file."""
