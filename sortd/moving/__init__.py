"""The only package that renames, links or unlinks a user's file."""
