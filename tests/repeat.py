"""Run the tests again and again on a bare clone, half of the runs beside four busy loops, and count those that passed.

python -m tests.repeat --idle 10 --busy 10 --logs DIR

With ``--logs`` a run that was interrupted goes on where it stopped, as long as the commit is the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
BUSY_LOOPS = 4
BUSY = "while True: pass"


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep the processors busy by so many processes."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Verdict(NamedTuple):
    """The result of one run of the tests."""

    kind: str
    passed: bool
    seconds: int


def run(clone: Path, log: Path) -> bool:
    """Run the README's test command in a clone, its output into a file; tell whether it passed."""
    with log.open("w") as output:
        return subprocess.run(["make", "test"], cwd=clone, stdout=output, stderr=output, check=False).returncode == 0


def read_verdicts(file: Path, commit: str) -> list[Verdict]:
    """Return the verdicts of an earlier run of the same commit; none of another one's."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [Verdict(line["kind"], line["passed"], line["seconds"]) for line in lines if line["commit"] == commit]


def main() -> int:
    """Print a line for each run and the counts at the end; status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=10, metavar="N", help="runs with nothing beside them")
    parser.add_argument("--busy", type=int, default=10, metavar="N", help=f"runs beside {BUSY_LOOPS} busy loops")
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="keep the output of each run there")
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True).strip()
    with tempfile.TemporaryDirectory(prefix="sortd-repeat-") as folder:
        clone, logs = Path(folder) / "sortd", arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        verdicts = read_verdicts(logs / "runs.jsonl", commit)
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        subprocess.run(["make", "setup"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
        wanted = [("idle", 0)] * arguments.idle + [("busy", BUSY_LOOPS)] * arguments.busy
        for kind, loops in wanted[len(verdicts) :]:
            log, began = logs / f"run-{len(verdicts) + 1}.log", time.monotonic()
            with busy(loops):
                passed = run(clone, log)
            verdicts.append(Verdict(kind, passed, round(time.monotonic() - began)))
            with (logs / "runs.jsonl").open("a") as file:
                file.write(json.dumps({"commit": commit, **verdicts[-1]._asdict()}) + "\n")
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            print(len(verdicts), *verdicts[-1], last, file=sys.stderr, flush=True)
    count = sum(verdict.passed for verdict in verdicts)
    seconds = {kind: [verdict.seconds for verdict in verdicts if verdict.kind == kind] for kind in ("idle", "busy")}
    print(json.dumps({"commit": commit, "runs": len(verdicts), "passed": count, "seconds": seconds}))
    return 0 if count == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
