"""Scans and watches of folders."""
