"""Finding latents that say the same, by direction and by activation, and training them apart."""
