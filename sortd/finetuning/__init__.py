"""Parts of fine-tuning: data and split, training, comparison, and what the result folder shows."""
