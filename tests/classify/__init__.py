"""Tests of ``sortd.classify``."""
