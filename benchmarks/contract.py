"""Record what users and programs rely on of sortd as one JSON file, and compare two such files.

    python -m benchmarks.contract record FILE
    python -m benchmarks.contract compare OLD NEW

Recorded are the help, the JSON output and the exit codes of the commands, the log events with their fields, the
metrics, the configuration keys and the journal's schema, from a scripted run on the sample images in a temporary
folder. Everything is read from the command line, the files that it writes and the documentation, so that the same
script runs on versions with different modules. ``compare`` prints each difference and exits with 1 if there is any.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml

REPOSITORY = Path(__file__).parents[1]
DATASET = "Tornillos"
SETTINGS = {
    "root": "Data",
    "model": "packaged",
    "state_dir": "state",
    "cache_dir": "cache",
    "threads": 1,
    "settle_seconds": 0.2,
    "metrics": {"textfile": "sortd.prom"},
}
MASKED = frozenset({
    "at", "id", "run", "undoes", "undone_by", "pid", "written_at", "started_at", "last_move_at", "timestamp", "seconds",
    "encode_seconds", "free_bytes", "version",
})  # fmt: skip
"""Keys of JSON whose values differ from run to run."""

MASKS = (
    (re.compile(r"(?<=\w-)[0-9a-f]{8}(?=[/\s.]|$)"), "<hash>"),  # state folders carry a hash of the dataset's path
    (re.compile(r"\bpid \d+"), "pid <n>"),
    (re.compile(r"\d[\d.,]* (GB|MB|kB|B) left"), "<size> left"),
    (re.compile(r"sortd \d+\.\d+\S*"), "sortd <version>"),
)
COUNTED = frozenset({"outcomes", "reasons", "total"})
"""Keys of JSON whose objects have an entry for whatever has happened so far."""

READY_SECONDS = 180.0

Facts = dict[str, Any]
Mask = Callable[[object], Any]


class Sortd:
    """The command line of sortd on a temporary folder with the sample images."""

    def __init__(self, place: Path) -> None:
        """Lay out the references, the images to be filed and the configuration in ``place``."""
        self.place, self.dataset = place, place / "Data" / DATASET
        self.config = place / "config.yaml"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SORTD_", "XDG_"))}
        self._environment = kept | {"HOME": str(place), "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
        shutil.copytree(REPOSITORY / "Data" / DATASET / "Clases", self.dataset / "Clases")
        self.config.write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")

    def draw(self, *options: str) -> None:
        """Draw the sample images into ``Images/``."""
        draw = [sys.executable, str(REPOSITORY / "Data" / "draw.py"), "incoming", "--dataset", str(self.dataset)]
        subprocess.run([*draw, *options], check=True, capture_output=True)

    def __call__(self, *arguments: object, config: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command; ``config`` adds that option."""
        named = () if config is None else ("-c", config)
        return subprocess.run(
            self._command(*arguments, *named), env=self._environment, cwd=self.place, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def start(self, *arguments: object, stderr: int) -> "subprocess.Popen[str]":
        """Start a command that runs until it is stopped, its standard error a file descriptor."""
        command = self._command(*arguments)
        return subprocess.Popen(command, env=self._environment, cwd=self.place, stderr=stderr, text=True)

    @staticmethod
    def _command(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "sortd", *map(str, arguments)]


# ---------------------------------------------------------------- what is the same in every run


def masked(place: Path) -> Mask:
    """Return what replaces times, ids, sizes and temporary paths by fixed words, at any depth."""

    def text(value: str) -> str:
        value = value.replace(str(place), "<PLACE>").replace(str(REPOSITORY), "<REPOSITORY>")
        for pattern, word in MASKS:
            value = pattern.sub(word, value)
        return value

    def mask(value: Any) -> Any:  # noqa: ANN401 -- any JSON
        match value:
            case dict():
                return {text(key): masked_value(key, inner) for key, inner in sorted(value.items())}
            case list():
                return [mask(one) for one in value]
            case float():
                return round(value, 3)
            case str():
                return text(value)
        return value

    def masked_value(key: str, value: object) -> Any:  # noqa: ANN401 -- any JSON
        is_measured = key in MASKED or key.endswith(("_ms", "_seconds"))
        return f"<{kind(value)}>" if is_measured else mask(value)

    return mask


def kind(value: object) -> str:
    """Return the JSON type of a value."""
    names = {dict: "object", list: "array", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def shape(value: Any) -> Any:  # noqa: ANN401 -- any JSON
    """Return the keys of a value and the types behind them; of a list, the shape of its first entry."""
    match value:
        case dict():
            return {
                key: "object" if key in COUNTED and isinstance(inner, dict) else shape(inner)
                for key, inner in sorted(value.items())
            }
        case list():
            return [shape(one) for one in value[:1]]
    return kind(value)


# ---------------------------------------------------------------- what is recorded


def helps(sortd: Sortd, *command: str) -> Iterator[tuple[str, Facts]]:
    """Yield the help and the flags of a command, then of each of its subcommands."""
    text = sortd(*command, "--help").stdout
    flags = sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text)))
    yield " ".join(("sortd", *command)), {"flags": flags, "text": [line.rstrip() for line in text.splitlines()]}
    _, _, listed = text.partition("─ Commands ─")
    for name in re.findall(r"^│ ([a-z][\w-]*) ", listed, re.MULTILINE):
        yield from helps(sortd, *command, name)


def configuration(sortd: Sortd) -> Facts:
    """Return each documented key with its default, and what is said of a wrong value of each."""
    example = REPOSITORY / "config.example.yaml"
    defaults = yaml.load(example.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 -- builds text only
    wrong = sortd.place / "wrong.yaml"
    refusals = {}
    for spoilt in ({"wrong": "value"}, "-1", "?"):
        wrong.write_text(yaml.safe_dump(_spoilt(defaults, spoilt) | {"no_such_key": 1}), encoding="utf-8")
        findings = json.loads(sortd("check", "--json", config=wrong).stdout)["findings"]
        refusals[json.dumps(spoilt)] = sorted(re.sub(r"^\S+?:\d+:\d+: ", "", one["what"]) for one in findings)
    return {"defaults": defaults, "refusals": refusals}


def _spoilt(values: Mapping[str, Any], wrong: object) -> Facts:
    return {key: _spoilt(value, wrong) if isinstance(value, dict) and value else wrong for key, value in values.items()}


def documented_events() -> Facts:
    """Return the documented log events and their meaning."""
    text = (REPOSITORY / "docs" / "log.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- events") : text.index("<!-- /events")]
    return dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", table, re.MULTILINE))


def metrics(text: str) -> Facts:
    """Return each metric's help, type and label names, from the text format of Prometheus."""
    found: Facts = {}
    for line in text.splitlines():
        if declared := re.fullmatch(r"# (HELP|TYPE) (\S+) (.*)", line):
            found.setdefault(declared[2], {})[declared[1].lower()] = declared[3]
        elif sample := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            found.setdefault(sample[1], {})["labels"] = sorted(re.findall(r'(\w+)="', sample[2] or ""))
    return found


def schema(place: Path) -> Facts:
    """Return the tables, indexes and version of each journal."""
    found = {}
    for file in sorted((place / "state").glob("*/journal.sqlite")):
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            made = database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
            objects = {name: " ".join(sql.split()) for name, sql in made}
            pragmas = {
                name: database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")
            }
        found[file.parent.name.rpartition("-")[0]] = {"objects": objects, **pragmas}
    return found


def logged(*streams: str) -> Facts:
    """Return by event the fields of its lines with their types, and how many lines of images there were."""
    fields: dict[str, dict[str, set[str]]] = {}
    counts: Counter[str] = Counter()
    for line in (line for stream in streams for line in stream.splitlines()):
        if not line.startswith("{"):
            continue
        told = json.loads(line)
        if "logger" in told:  # of another library
            continue
        if told["event"].startswith("image."):
            counts[told["event"]] += 1
        for name, value in told.items():
            fields.setdefault(told["event"], {}).setdefault(name, set()).add(kind(value))
    events = {
        event: {name: sorted(kinds) for name, kinds in sorted(named.items())} for event, named in sorted(fields.items())
    }
    return {"fields": events, "images": dict(sorted(counts.items()))}


def refused(sortd: Sortd) -> Facts:
    """Return the exit codes and messages of commands that cannot do what is asked, and of some that can."""
    place = sortd.place
    files = {
        "broken.yaml": "settle_seconds: never\n",
        "no-model.yaml": yaml.safe_dump(SETTINGS | {"model": "no-such-model"}),
        "file-as-state.yaml": yaml.safe_dump(SETTINGS | {"state_dir": "config.yaml"}),
        "no-root.yaml": yaml.safe_dump(SETTINGS | {"root": "nowhere"}),
    }
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    usual = str(sortd.config)
    asked: Sequence[Sequence[str]] = (
        ("--version",),
        ("no-such-command",),
        ("status", "--no-such-flag"),
        ("history", "--outcome", "other", "-c", usual),
        ("history", "--since", "sometime", "-c", usual),
        ("history", "--dataset", "none", "-c", usual),
        ("undo", "-c", usual),
        ("undo", "nowhere.jpg", "-c", usual),
        ("undo", "--last", "1", "--run", "x", "-c", usual),
        ("release", "-c", usual),
        ("release", "nowhere.jpg", "-c", usual),
        ("rebuild", "-c", usual),
        ("status", "-c", usual),
        ("explain", "nowhere.jpg", "-c", usual),
        ("finetune", "none", "-c", usual),
        ("models", "promote", "nowhere", "-c", usual),
        ("bench", "empty", "-c", usual),
        ("status", "-c", "missing.yaml"),
        ("status", "-c", "broken.yaml"),
        ("check", "-c", "broken.yaml"),
        ("once", "-c", "no-model.yaml"),
        ("check", "-c", "no-model.yaml"),
        ("once", "-c", "file-as-state.yaml"),
        ("once", "-c", "no-root.yaml"),
        ("check", "-c", "no-root.yaml"),
        ("init", "Data/Tornillos/inside"),
        ("init", "new", "--class", "a"),
    )
    (place / "empty").mkdir()
    return {" ".join(one): _answer(sortd(*one)) for one in asked}


def _answer(done: "subprocess.CompletedProcess[str]") -> Facts:
    said = done.stderr.strip().splitlines()
    last = json.loads(said[-1]).get("error", said[-1]) if said and said[-1].startswith("{") else done.stderr.strip()
    return {"exit_code": done.returncode, "stderr": last}


def scripted(sortd: Sortd, mask: Mask) -> Facts:
    """File the sample images, look at them, undo one, release it, and let a daemon run for a moment."""
    sortd.draw()
    config = sortd.config
    facts: Facts = {"check --json, before": _json(sortd("check", "--json", "--thorough", config=config), mask)}
    facts["once --dry-run --json"] = _lines(sortd("once", "--dry-run", "--json", config=config), mask)
    once = sortd("once", config=config)
    for command in ("status --json", "history --json --limit 0", "check --json --thorough", "models --json"):
        facts[command] = _json(sortd(*command.split(), config=config), mask)
    facts["tree"] = sorted(
        mask(str(path.relative_to(sortd.dataset))) for path in sortd.dataset.rglob("*") if not path.is_dir()
    )
    moved = json.loads(sortd("history", "--json", "--outcome", "filed", config=config).stdout)["moves"]
    filed = min(moved, key=lambda record: record["from"])
    undo = sortd("undo", filed["to"], "--json", config=config)
    facts["undo --json"] = _json(undo, mask)
    facts["status --json, with a held file"] = _json(sortd("status", "--json", config=config), mask)
    facts["release --json"] = _json(sortd("release", filed["from"], "--json", config=config), mask)
    facts["explain --json"] = _json(sortd("explain", filed["from"], "--json", config=config), mask)
    facts["eval --json"] = _json(sortd("eval", "--json", config=config), mask)
    facts["bench --json, shape"] = shape(json.loads(sortd("bench", "--json", "--images", "8", config=config).stdout))
    facts["daemon"], told = daemon(sortd, mask)
    facts["log"] = logged(once.stderr, undo.stderr, told)
    facts["exit codes of run"] = {"once": once.returncode, "undo": undo.returncode}
    return facts


def daemon(sortd: Sortd, mask: Mask) -> tuple[Facts, str]:
    """Run the daemon until it is ready, ask it, reload and stop it; return the answers and its log."""
    log, port = sortd.place / "daemon.log", _free_port()
    settings = SETTINGS | {"metrics": {"textfile": "sortd.prom", "http_port": port}}
    sortd.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with log.open("w", encoding="utf-8") as written:
        running = sortd.start("run", "-c", sortd.config, stderr=written.fileno())
    try:
        for event in ("daemon.ready", "image.filed"):
            _wait_for(log, event)
        facts = {
            "status": _json(sortd("status", "--json", config=sortd.config), shape),
            "second once": mask(_answer(sortd("once", config=sortd.config))),
            "rebuild": _json(sortd("rebuild", "--json", config=sortd.config), mask),
            "release": _json(sortd("release", "--all", "--json", config=sortd.config), mask),
            "undo": _json(sortd("undo", "--last", "1", "--dry-run", "--json", config=sortd.config), shape),
        }
        sortd.config.write_text(yaml.safe_dump(settings | {"rescan_seconds": 77}), encoding="utf-8")
        running.send_signal(signal.SIGHUP)
        _wait_for(log, "config.reloaded")
        sortd.config.write_text("settle_seconds: never\n", encoding="utf-8")
        running.send_signal(signal.SIGHUP)
        _wait_for(log, "config.refused")
        facts |= {"metrics": metrics(_got(port, "/metrics")), "/healthz": _got(port, "/healthz")}
    finally:
        sortd.config.write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
        running.terminate()
        code = running.wait()
    return {**facts, "exit_code": code}, log.read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number


def _got(port: int, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def _wait_for(log: Path, event: str) -> None:
    until = time.monotonic() + READY_SECONDS
    while f'"{event}"' not in log.read_text(encoding="utf-8"):
        if time.monotonic() > until:
            raise TimeoutError(f"no {event} in {READY_SECONDS:.0f} s:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.05)


def _json(done: "subprocess.CompletedProcess[str]", mask: Mask) -> Facts:
    """Return what a command printed and its exit code; lists of records and findings in an order of their own."""
    try:
        told = mask(json.loads(done.stdout))
    except ValueError:
        told = {"stdout": done.stdout, "stderr": done.stderr}
    if isinstance(told, dict) and "findings" in told:
        told["findings"].sort(key=json.dumps)
    if isinstance(told, dict) and "moves" in told:
        told["moves"].sort(key=lambda one: (str(one.get("from")), json.dumps(one)))
    return {"exit_code": done.returncode, "stdout": told}


def _lines(done: "subprocess.CompletedProcess[str]", mask: Mask) -> Facts:
    lines = [mask(json.loads(line)) for line in done.stdout.splitlines()]
    return {"exit_code": done.returncode, "lines": sorted(lines, key=lambda one: str(one["path"]))}


def record() -> Facts:
    """Return everything that is recorded, as plain values."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sortd, mask = Sortd(place), masked(place)
        return {
            "help": dict(helps(sortd)),
            "configuration": configuration(sortd),
            "events": documented_events(),
            "run": scripted(sortd, mask),
            "journal": schema(place),
            "exit codes": mask(refused(sortd)),
        }


# ---------------------------------------------------------------- comparison


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:  # noqa: ANN401 -- any JSON
    """Yield a line for each value that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            name = f"{where} / {key}" if where else key
            if key not in new:
                yield f"{name}: removed, was {_short(old[key])}"
            elif key not in old:
                yield f"{name}: added, is {_short(new[key])}"
            else:
                yield from differences(old[key], new[key], name)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _differences_of_lists(old, new, where)
    elif old != new:
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _differences_of_lists(old: list[Any], new: list[Any], where: str) -> Iterator[str]:
    if len(old) == len(new) and all(isinstance(one, dict) for one in (*old, *new)):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{where} [{number}]")
        return
    first, second = (Counter(json.dumps(one, sort_keys=True) for one in side) for side in (old, new))
    yield from (f"{where}: - {one}" for one in (first - second).elements())
    yield from (f"{where}: + {one}" for one in (second - first).elements())
    if first == second and old != new:
        yield f"{where}: in another order"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}…"


def main() -> None:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record", help="run sortd and write the file").add_argument("file", type=Path)
    compare = commands.add_parser("compare", help="print what differs; exit with 1 if anything does")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    asked = parser.parse_args()
    if asked.command == "record":
        asked.file.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (asked.old, asked.new))
    found = list(differences(old, new))
    for line in found:
        print(line)
    print(f"{len(found)} differences", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
