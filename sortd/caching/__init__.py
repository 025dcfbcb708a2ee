"""Parts of the cache: its tables and what it keeps of a prototype set."""
