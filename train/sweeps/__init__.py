"""Many runs from one reading: a grid or list of settings, trained side by side."""
