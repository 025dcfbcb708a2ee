"""The core: events in, commands out; it reads no clock, file or log."""
