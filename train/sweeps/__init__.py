"""Many runs that read their rows once: a grid or list of settings, trained side by side."""
