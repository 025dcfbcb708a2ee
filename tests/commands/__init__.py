"""Tests of ``sortd.commands``."""
