"""Tests of sortd as a library."""
