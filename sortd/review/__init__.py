"""The review page: a local web server to look at what waits, confirm it, correct it, and undo."""
