"""Reading of images: formats, decoding, and the processes that decode."""
