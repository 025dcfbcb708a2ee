"""What somebody may put under the name of a file that sortd reads or writes in a folder of theirs."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

SPARSE_BYTES = 3 << 30


def make_socket(path: Path) -> None:
    """Leave a socket under a path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))


def make_sparse(path: Path) -> None:
    """Make a file of three gigabytes that takes no room."""
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "sparse file": make_sparse,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
}
"""What somebody may put under the name of a small file."""
