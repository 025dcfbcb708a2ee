"""Converts pickled weights to safetensors, once, in a process without network that accepts nothing but tensors.

Some of the first CLIPs, and copies of them, exist only as ``pytorch_model.bin``. A pickle can run code when it is
loaded; torch's restricted unpickler accepts tensors and their containers. The process that loads it can open no socket:
even an error in that unpickler sends nothing away.
"""

import ctypes
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sortd.encoder.models import WEIGHTS, first_line, module_folders, weight_files
from sortd.errors import ModelError
from sortd.files import write_json

PICKLE = "pytorch_model.bin"
_PARTS = "pytorch_model-*-of-*.bin"
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # prctl(2)
_CALLS = {"x86_64": (0xC000_003E, 41, 425), "aarch64": (0xC000_00B7, 198, 425)}
"""By machine: its number in seccomp(2), and those of socket(2) and io_uring_setup(2)."""


def convert_folder(name: str, folder: Path) -> list[Path]:
    """Write the pickled weights of each module of a model as safetensors beside them; return the written files.

    Raises:
        ModelError: a pickle holds something other than tensors, or there is no disk space.
    """
    written: list[Path] = []
    for module in dict.fromkeys(module_folders(name, folder)):
        written += [_convert(name, pickle) for pickle in _pickles(name, module)]
        _write_index(module, [path for path in written if path.parent == module and path.name != WEIGHTS])
    return written


def _pickles(name: str, folder: Path) -> list[Path]:
    if weight_files(name, folder):
        return []
    single = folder / PICKLE
    return [single] if single.is_file() else sorted(path for path in folder.glob(_PARTS) if path.is_file())


def _convert(name: str, pickle: Path) -> Path:
    target = pickle.with_name(pickle.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors")
    try:
        descriptor, part = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
        os.close(descriptor)
    except OSError as error:
        raise ModelError(f"cannot convert {name}: {pickle.parent}: {error.strerror}; make it writable") from error
    try:
        done = subprocess.run(  # noqa: S603 -- this Python, with two paths
            [sys.executable, "-P", "-m", __name__, str(pickle.absolute()), part],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise ModelError(f"cannot convert {name}: {pickle.name} {why}")
        if target.exists():
            raise ModelError(f"cannot convert {name}: {target} exists; remove it, or convert a fresh copy")
        Path(part).chmod(0o644)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _write_index(folder: Path, parts: list[Path]) -> None:
    """Write the index of several files of weights, which transformers reads first."""
    from safetensors import safe_open

    if not parts:
        return
    places: dict[str, str] = {}
    for part in parts:
        with safe_open(part, "np") as file:
            places |= dict.fromkeys(file.keys(), part.name)
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": places})


# ------------------------------------------------------------ in the converting process


def _forbid_network() -> None:
    """Let the kernel refuse sockets to this process and its children; see seccomp(2). Raises OSError."""
    machine, *refused = _CALLS.get(platform.machine(), (0,))
    if not refused:
        raise OSError(f"no list of system calls for {platform.machine()}; convert it on x86_64 or aarch64")
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # of the Berkeley packet filter
    tests = [(at_least, 0x4000_0000), *((equal, call) for call in refused)]  # the first: another numbering of x86_64
    program = [(load, 0, 0, 4), (equal, 0, len(tests) + 2, machine), (load, 0, 0, 0)]
    program += [(code, len(tests) - index, 0, value) for index, (code, value) in enumerate(tests)]
    program += [(answer, 0, 0, 0x7FFF_0000), (answer, 0, 0, 0x0005_0001)]  # allow; EPERM
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    head = struct.pack("HP", len(program), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    for option, value, pointer in ((_SET_NO_NEW_PRIVILEGES, 1, None), (_SET_SECCOMP, _FILTER, head)):
        if library.prctl(option, value, pointer, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses to forbid the network")


def _tensors(pickle: str) -> Iterator[tuple[str, object]]:
    import torch

    for key, value in torch.load(pickle, map_location="cpu", weights_only=True).items():
        if not torch.is_tensor(value):
            raise TypeError(f"{key} is no tensor")
        yield str(key), value.detach().clone().contiguous()  # tensors may share memory, which safetensors refuses


def write_tensors(pickle: str, target: str) -> int:
    """Convert one file; print why not to stderr."""
    from safetensors.torch import save_file

    try:
        _forbid_network()
        tensors = dict(_tensors(pickle))
    except Exception as error:  # noqa: BLE001 -- a hostile pickle can raise anything
        print(f"holds something other than weights, and was not run ({first_line(error)})", file=sys.stderr)
        return 1
    try:
        save_file(tensors, target, {"format": "pt"})  # type: ignore[arg-type]  # tensors, by the check above
    except Exception as error:  # noqa: BLE001 -- safetensors has its own error for a full disk
        print(f"cannot be written as {target}: {first_line(error)}; make room there", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(write_tensors(*sys.argv[1:]))
