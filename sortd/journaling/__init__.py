"""Parts of the journal: records, store, history."""
