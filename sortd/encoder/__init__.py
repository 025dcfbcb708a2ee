"""Models that turn images and words into embeddings: found on this disk, loaded, exported, and run."""
