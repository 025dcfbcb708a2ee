"""How much of sortd one event runs through: modules, functions and SQL statements, counted as they are called.

    python -m benchmarks.path [--model MODEL] [--list] [--json]

The daemon runs in this very process, on a small made dataset in a temporary folder, with the packaged model. Two ways
are followed, each from a file that appears to the line in the log that tells its end:

    image        a file in Images/ to ``image.filed``
    references   a file in Clases/<class>/ to ``prototypes.rebuilt``

Counted is every function of sortd that any thread calls between the two (sys.setprofile), and every statement that
SQLite executes (its trace callback) but BEGIN and COMMIT. What the decoding process runs is not counted; the periodic
work of an idle daemon that falls into the time is.
"""

import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sortd
from benchmarks.harness import argument_parser, print_json
from sortd import cli
from tests.daemon_process import make_dataset, picture

PACKAGE = os.path.dirname(os.path.realpath(sortd.__file__)) + os.sep
PATIENCE_SECONDS = 120


@dataclass
class Recorder:
    """What is called and executed while it is switched on."""

    is_on: bool = False
    codes: set[CodeType] = field(default_factory=set)
    statements: list[str] = field(default_factory=list)

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Take note of a call; for sys.setprofile."""
        if self.is_on and event == "call":
            self.codes.add(frame.f_code)

    def connect(self, *arguments: Any, **keywords: Any) -> sqlite3.Connection:  # noqa: ANN401 - those of sqlite3.connect
        """Open a database whose statements are noted, in place of ``sqlite3.connect``."""
        connection: sqlite3.Connection = CONNECT(*arguments, **keywords)
        connection.set_trace_callback(self._note)
        return connection

    def _note(self, statement: str) -> None:
        if self.is_on and statement.split(maxsplit=1)[0] not in {"BEGIN", "COMMIT"}:
            self.statements.append(statement)

    def follow(self, start: Callable[[], object], is_over: Callable[[], bool]) -> dict[str, Any]:
        """Do something, wait until it is over, and return what was called meanwhile."""
        self.codes.clear()
        self.statements.clear()
        self.is_on = True
        start()
        wait_until(is_over)
        self.is_on = False
        ours = [code for code in self.codes if code.co_filename.startswith(PACKAGE)]
        functions = sorted(
            f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_qualname}"  # type: ignore[attr-defined, unused-ignore]
            for code in ours
            if not code.co_name.startswith("<")  # lambdas and comprehensions are part of the function around them
        )
        modules = sorted({code.co_filename.removeprefix(PACKAGE) for code in ours})
        return {"modules": modules, "functions": functions, "statements": list(self.statements)}


CONNECT = sqlite3.connect


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it did not become so.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        if time.monotonic() > until:
            raise TimeoutError("the daemon did not do what was waited for")
        time.sleep(0.005)


def measure(folder: Path, model: str, recorder: Recorder) -> dict[str, Any]:
    """Run the daemon in this thread and follow both ways from another; return what was called on each."""
    dataset = make_dataset(folder / "Data")
    keys = {"root": folder / "Data", "model": model, "state_dir": folder / "state", "cache_dir": folder / "cache"}
    config = folder / "config.yaml"
    more = "settle_seconds: 0.3\nabstain: off\nmode: max\nlog: {format: json}\n"
    config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + more, encoding="utf-8")
    log, found = folder / "log", {}

    def count(event: str) -> int:
        return sum(f'"event": "{event}"' in line for line in log.read_text(encoding="utf-8").splitlines())

    def drive() -> None:
        try:
            wait_until(lambda: count("daemon.ready") == 1)
            fresh = folder / "fresh.png"
            picture("red", 1).save(fresh)
            found["image"] = recorder.follow(
                lambda: fresh.rename(dataset / "Images" / "a.png"), lambda: count("image.filed") == 1
            )
            picture("red", 2).save(fresh)
            built = count("prototypes.rebuilt")
            found["references"] = recorder.follow(
                lambda: fresh.rename(dataset / "Clases" / "red" / "new.png"),
                lambda: count("prototypes.rebuilt") > built,
            )
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    terminal = os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    sqlite3.connect = recorder.connect  # type: ignore[assignment]  # its overloads are not spelt out
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)
    driver = threading.Thread(target=drive, name="driver")
    driver.start()
    try:
        cli.run(config)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        sqlite3.connect = CONNECT
        driver.join()
        os.dup2(terminal, 2)
    return found


def main() -> None:
    """Print the counts of both ways, and with ``--list`` what was counted."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--list", action="store_true", help="print each module, function and statement, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-path-") as folder:
        found = measure(Path(folder), arguments.model, Recorder())
    counts = {way: {what: len(names) for what, names in counted.items()} for way, counted in found.items()}
    if arguments.json:
        print_json(found if arguments.list else counts, n=1)
        return
    for way, counted in found.items():
        print(way, ", ".join(f"{number} {what}" for what, number in counts[way].items()))
        for what in counted if arguments.list else ():
            print(*(f"    {' '.join(name.split())}" for name in counted[what]), sep="\n")


if __name__ == "__main__":
    main()
