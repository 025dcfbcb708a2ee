"""Reading of images: formats, decoding, and the decoding processes."""
