"""What stands in folders and what happens there."""
