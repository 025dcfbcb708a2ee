"""Every error that sortd raises on purpose, in three families: who must act?

``StartupError``: the operator, now. ``ImageError``: nobody, that image waits or is set aside and the rest goes on.
``StorageError``: the disk or whoever owns it; the daemon holds a dataset rather than guess.
A message says what happened, to which path, and what to do.
"""


class SortdError(Exception):
    """Base of all of them; ``exit_code`` is what the command line returns (see sysexits(3))."""

    exit_code = 70


class StartupError(SortdError):
    """sortd cannot start, or cannot do what was asked; the operator has to mend something."""

    exit_code = 78


class ConfigError(StartupError):
    """The configuration is not valid; one line for each mistake as ``file:line:col: key: message``."""


class LayoutError(StartupError):
    """The folders are not what they must be: missing, overlapping, not writable."""


class AlreadyRunningError(StartupError):
    """Another sortd works on the same dataset."""

    exit_code = 75


class StoppedError(StartupError):
    """What was to be done once was stopped by a signal before it was done; whoever asked may ask again."""

    exit_code = 75


class ModelError(StartupError):
    """The model cannot be had or is no CLIP."""

    exit_code = 69


class DataError(StartupError):
    """The data handed to an offline command cannot serve: no classes, one class, no image."""

    exit_code = 65


class ImageError(SortdError):
    """One image cannot be handled now; the others go on."""

    exit_code = 65


class UnreadableError(ImageError):
    """The bytes are no image that sortd decodes, or a broken one."""


class TooLargeError(ImageError):
    """The image is over a limit on bytes, pixels, sides, memory or time."""


class CrowdedError(ImageError):
    """Decoding the image takes more room than it was given; it is to be asked for again with ``pixels`` of it."""

    def __init__(self, pixels: int) -> None:
        """Say how much room, in pixels, it takes."""
        super().__init__(f"decoding it takes the room of {pixels:,} pixels")
        self.pixels = pixels


class NotAnImageError(ImageError):
    """Neither the name nor the content says image: it is left where it is."""


class ChangedError(ImageError):
    """The file is no longer the version that was looked at."""


class VanishedError(ImageError):
    """The file is gone."""


class BusyError(ImageError):
    """The file cannot be taken now: a writer has it open, or it cannot be opened; it is looked at again later."""


class StorageError(SortdError):
    """A disk refused what durability needs."""

    exit_code = 74


class JournalError(StorageError):
    """The journal of a dataset cannot be written or read: nothing of it may move until it was opened anew."""


class SourceError(StorageError):
    """Nothing may be taken out of the folder of a file: that folder waits and is tried again."""

    exit_code = 73


class DestinationError(StorageError):
    """A destination refused the file: that dataset is held and tried again."""

    exit_code = 73
