"""What a run did, for people: `report.html`, its machine-readable twins, and the browser of latents."""
