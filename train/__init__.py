"""Stage 2: trains transcoders from a store. Nothing here reaches transformer-lens, transformers or datasets."""
