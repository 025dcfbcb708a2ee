"""Tests of ``sortd.daemon``."""
