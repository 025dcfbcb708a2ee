"""Tests of ``sortd.watch``."""
