"""Tests of ``sortd.encoder``."""
