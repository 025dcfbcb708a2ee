"""sortd files the images dropped into a folder into the classes that their references teach."""

__version__ = "0.1.0"
