"""The daemon: its loop, its datasets and its worker."""
