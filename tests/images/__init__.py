"""Tests of ``sortd.images``."""
