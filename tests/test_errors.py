"""Every error of the system that sortd can meet is followed by what a person can do about it."""

import errno
import os

import pytest

from sortd import errors


def of(number: int, path: str = "/photos/Clases") -> OSError:
    """Make the error that the kernel gives for a path."""
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "permission to read"),
        (errno.EPERM, "permission to read"),
        (errno.ENOENT, "mounted"),
        (errno.EIO, "mounted and works"),
        (errno.ESTALE, "mounted and works"),
        (errno.ELOOP, "symbolic link"),
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.E2BIG, "mounted and works"),
    ],
)
def test_unreadable_has_path_cause_and_advice(number: int, advice: str) -> None:
    """The advice depends on the error number."""
    said = errors.unreadable(of(number))
    assert said.startswith(f"/photos/Clases cannot be read: {os.strerror(number)}; ")
    assert advice in said


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "permission to write"),
        (errno.EPERM, "immutable"),
        (errno.EROFS, "for writing"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.ENOTDIR, "move away the file"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EIO, "mounted and works"),
        (errno.ENOTCONN, "mounted and works"),
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.EBUSY, ""),
    ],
)
def test_advice_for_write_is_empty_without_advice(number: int, advice: str) -> None:
    """The advice depends on the error number, and may be empty."""
    assert advice in errors.advice_for_write(of(number))
    assert bool(errors.advice_for_write(of(number))) == bool(advice)


def test_advice_for_an_error_without_number_is_general() -> None:
    """A library may raise an OSError without a number."""
    assert errors.advice_for_write(OSError("no number")) == ""
    assert errors.advice_for(OSError("no number"))
