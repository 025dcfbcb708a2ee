"""Parts of the mover: renames, copies to another file system, recovery, companions, free names."""
