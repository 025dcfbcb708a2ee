"""Decide on millions of images with Ray Data or in shards, and move them afterwards."""
