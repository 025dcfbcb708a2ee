"""Parts of image reading: formats, pixels, and the processes that decode what strangers wrote."""
