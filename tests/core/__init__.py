"""Tests of ``sortd.core``."""
