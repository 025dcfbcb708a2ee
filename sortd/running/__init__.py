"""What a running daemon is made of: sites, datasets, the worker, filing, requests."""
