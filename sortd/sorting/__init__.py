"""Parts of the sorter: pauses, the guard, orders to the worker and rounds of a rebuild."""
