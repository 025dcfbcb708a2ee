"""What a function did to disks, step by step, as strace saw it: the protocol of docs/durability.md in the making."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

from tests.faults.injection import PATIENCE_SECONDS, attached, be_child

_CALLS = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,write,openat"
_LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)(?:<[^>]*>)?(?: (E\w+))?")
_FOLDER_AND_NAME = re.compile(r'(?:AT_FDCWD|\d+<([^>]*)>|AT_FDCWD<[^>]*>), "([^"]*)"')
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
_TOKEN = re.compile(r"\.sortd-[0-9a-f]{16}\.")


def steps_of(act: Callable[[], object], root: Path) -> list[str]:
    """Run a function in a child and return its steps, with paths below ``root`` and consecutive equal ones as one."""
    with NamedTemporaryFile("r", suffix=".strace") as log:
        child = be_child(act)
        tracer = attached(child, log.name, ["-y", "-s", "400", "-e", f"trace={_CALLS}"])
        os.kill(child, 18)
        status = os.waitpid(child, 0)[1]
        tracer.wait(PATIENCE_SECONDS)
        if tracer.stderr:
            tracer.stderr.close()
        lines = Path(log.name).read_text().splitlines()
    assert status == 0, "the function that was watched failed"
    told = [step for line in lines if (step := _step(line, root))]
    return [step for before, step in zip(["", *told], told, strict=False) if step != before]


def _step(line: str, root: Path) -> str:  # noqa: PLR0911 - one answer for each kind of call
    found = _LINE.match(line)
    if not found:
        return ""
    call, arguments, _, error = found.groups()
    failed = f" {error}" if error else ""
    paths = [
        _below(f"{folder}/{name}" if folder else name, root) for folder, name in _FOLDER_AND_NAME.findall(arguments)
    ]
    match call:
        case "fsync" | "fdatasync":
            synced = _DESCRIPTOR.match(arguments)
            path = synced[1] if synced else ""
            if path.endswith("journal.db-wal"):
                return "journal"
            return f"sync {_below(path, root)}{failed}" if _is_below(path, root) else ""
        case "write":
            written = _DESCRIPTOR.match(arguments)
            path = written[1] if written else ""
            return f"write {_below(path, root)}" if _is_below(path, root) else ""
        case "openat":
            made = "O_CREAT" in arguments and bool(paths) and not paths[0].startswith("/")
            return f"make {paths[0]}{'' if 'O_EXCL' in arguments else ' CARELESSLY'}{failed}" if made else ""
        case "unlink" | "unlinkat" if paths and not paths[0].startswith("/"):
            return "" if error == "ENOENT" else f"remove {paths[0]}{failed}"
        case "mkdir" | "mkdirat" if paths and not paths[0].startswith("/"):
            return f"folder {paths[0]}{failed}"
        case "rename" | "renameat" | "renameat2":
            how = {"NOREPLACE": "", "EXCHANGE": " EXCHANGED"}
            flag = re.search("RENAME_([A-Z]+)", arguments)
            return f"rename {paths[0]} -> {paths[1]}{how[flag[1]] if flag else ' CARELESSLY'}{failed}"
        case "link" | "linkat":
            return f"link {paths[0]} -> {paths[1]}{failed}"
        case _:
            return ""


def _is_below(path: str, root: Path) -> bool:
    return path.startswith(f"{root}/")


def _below(path: str, root: Path) -> str:
    return _TOKEN.sub(".sortd-T.", path.removeprefix(f"{root}/"))
