"""Tests of ``sortd.store``."""
