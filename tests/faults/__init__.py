"""Faults let loose on moves: at every system call, and power cuts at every step."""
