"""What is remembered on disk: the journal of each dataset, and the cache of embeddings."""
