"""Tests of ``sortd.moving``."""
