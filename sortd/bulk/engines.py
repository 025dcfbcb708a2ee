"""The engines of ``bulk decide``: a plain loop over every n-th part of a manifest, or the actors of Ray Data.

Each unit of work is a part of the manifest. Its decisions are written to a file of its name, which appears when it is
complete; a part that has this file is done. So whatever is killed, each image is in the decisions once, and the same
batches are formed again.
"""

import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortd import errors
from sortd.bulk.decide import STAGES, DecideSettings, Load, PartDecider, Result, require_equal_settings
from sortd.bulk.plan import DECISIONS, MANIFEST, Tell, parts_of, read_run
from sortd.commands.console import counted, print_table, say
from sortd.errors import DataError, SortdError, StartupError

BLOCKS = 4096
"""Tasks of Ray, at most: it keeps some kilobytes for each."""
_OBJECT_STORE_BYTES = 100_000_000  # a hundredth of it is used, as only the names of parts pass through it


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How Ray distributes the parts."""

    actors: int
    gpus: float = 0.0  # of an actor
    address: str | None = None  # of a cluster; None: one on this machine, for as long as it takes


def decide_shard(
    run: Path,
    settings: DecideSettings,
    shard: tuple[int, int] = (1, 1),
    *,
    tell: Tell = lambda *_: None,
    load: Load | None = None,
) -> dict[str, Any]:
    """Decide every n-th part of a run, beginning with the i-th, in this process; return counts and seconds.

    Raises DataError: the run or the classifier is not usable; ModelError; DestinationError.
    """
    number, shards = shard
    began, (todo, done) = time.monotonic(), _parts(run, settings, shard)
    results: Iterator[Result | None] = iter(())
    with ExitStack() as closing:
        if todo:
            decider = closing.enter_context(PartDecider(settings, load=load))
            results = (decider.decide_part(run, part) for part in todo)
        return {"engine": f"shard {number}/{shards}", **_sums(run, results, len(todo), done, tell, began)}


def decide_with_ray(
    run: Path,
    settings: DecideSettings,
    options: RayOptions,
    *,
    tell: Tell = lambda *_: None,
    load: Load | None = None,
) -> dict[str, Any]:
    """Decide the parts of a run in actors of Ray Data; return and raise as ``decide_shard``."""
    began, (todo, done) = time.monotonic(), _parts(run, settings)
    actors = min(options.actors, len(todo))
    facts = {"engine": f"ray, {counted(actors, 'actor')}"}
    if not todo:
        return {**facts, **_sums(run, iter(()), 0, done, tell, began)}
    with _started_ray(options, processors=1 + actors * settings.config.threads) as ray:
        parts = ray.data.from_items([{"part": part} for part in todo], override_num_blocks=min(len(todo), BLOCKS))
        rows = parts.map_batches(
            _PartActor,
            batch_size=1,
            # A waiting task for each actor; by default more, which would then be done by the actor that started first.
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(run, settings, load),
            num_cpus=settings.config.threads,
            num_gpus=options.gpus,
        ).iter_rows()
        return {**facts, **_sums(run, (_result_of(row["result"]) for row in rows), len(todo), done, tell, began)}


class _PartActor:
    """Decides parts by their numbers in a process of Ray."""

    def __init__(self, run: Path, settings: DecideSettings, load: Load | None) -> None:
        self._run, self._settings, self._load = run, settings, load
        self._decider: PartDecider | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a result for each part, as JSON; the error of sortd that ended it is one, too."""
        try:
            if self._decider is None:
                self._decider = PartDecider(self._settings, load=self._load)
            results = [self._decider.decide_part(self._run, int(part)) for part in batch["part"]]
        except SortdError as error:
            return {"result": [json.dumps({"error": type(error).__name__, "message": str(error)})]}
        return {"result": [json.dumps(result) for result in results]}


def _result_of(text: str) -> Result | None:
    """Return the result of a part; raise the error of sortd that it is."""
    result: Result | None = json.loads(text)
    if result is not None and "error" in result:
        raise getattr(errors, result["error"])(result["message"])
    return result


@contextmanager
def _started_ray(options: RayOptions, *, processors: int) -> Iterator[Any]:
    """Yield the module of Ray, connected to a cluster, or to processes of its own that end with the block."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    if options.address is None:  # its ports run what they are sent, so only this process may use them
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment["RAY_worker_niceness"] = "0"  # as a shard; by default 15
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    own = tempfile.mkdtemp(prefix="r-") if options.address is None else None  # paths of sockets have 107 bytes
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    here = {"num_cpus": processors, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    with redirect_stdout(sys.stderr):  # Ray prints there which processes have ended, some of it at the shutdown
        try:
            if own is None:
                ray.init(options.address, **quiet)
            else:
                _start_here(ray, {"_temp_dir": own, **here, **quiet})
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield ray
        except ConnectionError as error:
            tokens = "if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            raise DataError(f"no connection to a cluster at {options.address}: {error}; {tokens}") from error
        finally:
            ray.shutdown()
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)


def _start_here(ray: Any, options: Mapping[str, object]) -> None:  # noqa: ANN401 -- a module without types
    """Start Ray on this machine; try again, since it waits 30 s for its processes. Raises StartupError in the end."""
    for tries_left in (2, 1, 0):
        try:
            ray.init("local", **options)
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if not tries_left:
                raise StartupError(f"Ray does not start; use --shard, or a machine with less load: {error}") from error
        else:
            return


def _parts(run: Path, settings: DecideSettings, shard: tuple[int, int] = (1, 1)) -> tuple[list[int], int]:
    """Return the parts of a shard that are not decided, and how many are.

    Raises DataError: there is no such shard, the run has no plan, or was begun with other settings.
    """
    number, shards = shard
    if not 1 <= number <= shards:
        raise DataError(f"there is no shard {number} of {shards}; --shard is 1/{shards} to {shards}/{shards}")
    read_run(run)
    require_equal_settings(run, settings)
    all_parts = [part for part in parts_of(run / MANIFEST) if part % shards == number - 1]
    decided = parts_of(run / DECISIONS).keys()
    todo = [part for part in all_parts if part not in decided]
    return todo, len(all_parts) - len(todo)


def _sums(
    run: Path, results: Iterator[Result | None], todo: int, done: int, tell: Tell, began: float
) -> dict[str, Any]:
    """Return the sums of results; None stands for a part that another process has decided meanwhile."""
    found: list[Result] = []
    for number, result in enumerate(results, start=1):
        tell("deciding", done + number, done + todo)
        if result is not None:
            found.append(result)
    images = sum(one["images"] for one in found)
    working = max((one["ended"] for one in found), default=0.0) - min((one["began"] for one in found), default=0.0)
    stages = {stage: sum(one[stage] for one in found) for stage in STAGES}
    return {
        "run": os.fspath(run),
        "parts": len(found),
        "parts_before": done,
        "images": images,
        "filed": sum(one["filed"] for one in found),
        "unreadable": sum(one["unreadable"] for one in found),
        "seconds": round(time.monotonic() - began, 3),
        "working_seconds": round(working, 3),  # without the start of the engine and the model
        "images_per_second": round(images / working, 3) if working else None,
        "stages": {
            stage: {"seconds": round(busy, 3), "images_per_second": round(images / busy, 1) if busy else None}
            for stage, busy in stages.items()
        },
    }


def print_decided(facts: Mapping[str, Any]) -> None:
    """Print what an engine returned."""
    rows = [(stage, f"{one['seconds']:.1f}", one["images_per_second"]) for stage, one in facts["stages"].items()]
    if facts["images"]:
        print_table(("stage", "seconds", "images/s"), rows, right=("seconds", "images/s"))
    before = f", {counted(facts['parts_before'], 'part')} before" if facts["parts_before"] else ""
    speed = f", {facts['images_per_second']:g} images/s" if facts["images_per_second"] else ""
    say(
        f"sortd: {counted(facts['images'], 'image')} in {counted(facts['parts'], 'part')}{before}: "
        f"{facts['filed']:,} filed, {facts['unreadable']:,} unreadable ({facts['engine']}{speed})"
    )
