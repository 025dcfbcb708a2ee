"""Few-shot classification on embeddings: pure numpy, see docs/decisions.md."""
