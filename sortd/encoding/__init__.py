"""Parts of the encoder: finding models, and running them."""
