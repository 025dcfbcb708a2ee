"""The tests of sortd."""
