"""The recipe that trains the small CLIP which ships in the package."""
