"""The command ``audit``: a random sample of filed images to look at, its answers, and what they prove."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from sortd.classify.proportions import out_of, proportion, proven
from sortd.commands.console import counted, format_time, print_line, print_table, printable, say, show
from sortd.commands.evaluation import check_page_path, render, write_page
from sortd.commands.moves import journal_of, without_links
from sortd.commands.status import dataset_named
from sortd.config import Config
from sortd.daemon.control import ask
from sortd.daemon.dataset_lock import lock_dataset
from sortd.errors import DataError, DestinationError, advice_for_write
from sortd.files import read_regular, write_json
from sortd.images.thumbnails import thumbnails
from sortd.layout import Layout

SAMPLE = 60
"""Images of a sample: without a mistake they prove 95 % at 95 % confidence."""
SAMPLE_FILE = "audit.json"
"""In the state folder of a dataset: the sample that was drawn and not answered yet."""
AT_ONCE = 200  # records that are read at once


@dataclass(frozen=True, slots=True)
class AuditSample:
    """A random sample of filed images, to be looked at."""

    drawn_at: float  # seconds since the epoch
    unchecked: int  # filed images that it was drawn from
    images: tuple[dict[str, Any], ...]  # ``id`` of the move, ``path``, ``label`` and ``score``


def open_sample(state_folder: Path) -> AuditSample | None:
    """Return the sample that was not answered yet; None if there is none, or its file is damaged."""
    try:
        facts = json.loads(read_regular(state_folder / SAMPLE_FILE))
        images = tuple(
            {
                "id": _number(one["id"]),
                "path": _name(one["path"]),
                "label": _name(one["label"]),
                "score": None if one["score"] is None else float(one["score"]),
            }
            for one in facts["images"]
        )
        return AuditSample(float(facts["drawn_at"]), int(facts["unchecked"]), images)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return None


def _number(value: object) -> int:
    """Return the number of a move; raise ValueError if the journal can have none such."""
    number = int(str(value))
    if not 0 < number < 1 << 63:
        raise ValueError(number)
    return number


def _name(value: object) -> str:
    """Return a text that can be a path; raise ValueError if none can be so."""
    if b"\0" in os.fsencode(str(value)):
        raise ValueError("NUL")
    return str(value)


def draw_sample(config: Config, layout: Layout, size: int | None) -> AuditSample:
    """Return the open sample, or draw one: by default, or if ``size`` is another one than that of the open sample.

    Raises DataError: there is no image to look at; JournalError; DestinationError.
    """
    folder = layout.state_folder(config.state_dir)
    before = open_sample(folder)
    if before is not None and before.images and size in {None, len(before.images)}:
        return before
    images, wanted = list[dict[str, Any]](), size or SAMPLE
    with journal_of(config, layout).open() as history:
        drawn = np.random.default_rng().permutation(np.array(history.to_audit(), np.int64)).tolist()
        unchecked = len(drawn)
        while drawn and len(images) < wanted:
            found = {record.id: record for record in history.finished(drawn[:AT_ONCE])}
            for record in (found[one] for one in drawn[:AT_ONCE]):
                path, reason = f"{layout.root}/{record.destination_path}", record.move_reason
                if os.path.isfile(path):
                    images.append({"id": record.id, "path": path, "label": reason.label or "", "score": reason.score})
            drawn = drawn[AT_ONCE:]
    if not images:
        raise DataError(f"{layout.name} has no filed image that was not checked")
    sample = AuditSample(time(), unchecked, tuple(images[:wanted]))
    try:
        write_json(folder / SAMPLE_FILE, asdict(sample), mode=0o644)
    except OSError as error:
        advice = advice_for_write(error) or "run the command as the user that runs sortd"
        raise DestinationError(f"{folder / SAMPLE_FILE} cannot be written: {error.strerror}; {advice}") from error
    return sample


def answer_sample(config: Config, layout: Layout, wrong: Sequence[Path]) -> dict[str, Any]:
    """Record the answers to the open sample by paths; see ``answer_sample_by_ids``."""
    sample = _required_sample(config, layout)
    places = {without_links(image["path"]): image["id"] for image in sample.images}
    named = {path: places.get(without_links(path)) for path in wrong}
    if strange := sorted(os.path.abspath(path) for path, found in named.items() if found is None):
        raise DataError(f"{strange[0]} is not in the sample; `sortd audit --dataset {layout.name}` shows it")
    return answer_sample_by_ids(config, layout, [found for found in named.values() if found is not None])


def answer_sample_by_ids(config: Config, layout: Layout, wrong: Sequence[int]) -> dict[str, Any]:
    """Record the answers to the open sample, and return them and what all samples prove as plain values.

    ``wrong`` has the ``id`` of each image that is in a wrong class. An image that is no longer where it was filed
    counts as wrong too: whoever moves it away corrects it.

    Raises:
        DataError: no sample is open, or an image is not in it.
        SortdError: the dataset is not there, or its journal cannot be written.
    """
    sample, named = _required_sample(config, layout), set(wrong)
    if strange := sorted(named - {image["id"] for image in sample.images}):
        raise DataError(f"the image of move {strange[0]} is not in the sample; another one was drawn since")
    gone = [one for one in sample.images if one["id"] not in named and not os.path.isfile(one["path"])]
    not_right = named | {one["id"] for one in gone}
    answers = [[image["id"], image["id"] not in not_right] for image in sample.images]
    request = {"do": "check", "dataset": layout.name, "root": str(layout.root), "answers": answers}
    if ask(config.state_dir, request) is None:
        with lock_dataset(layout, config.state_dir) as opened:
            opened.presence.require()
            opened.journal.record_checks([(int(move), bool(right)) for move, right in answers])
    (layout.state_folder(config.state_dir) / SAMPLE_FILE).unlink(missing_ok=True)
    with journal_of(config, layout).open() as history:
        accuracy = history.accuracy().values()
    return {
        "dataset": layout.name,
        "sample": proportion(len(answers) - len(not_right), len(answers)),
        "wrong": [image for image in sample.images if image["id"] in named],
        "gone": sorted(one["path"] for one in gone),
        "all": proportion(sum(one.audited_right for one in accuracy), sum(one.audited for one in accuracy)),
    }


def _required_sample(config: Config, layout: Layout) -> AuditSample:
    sample = open_sample(layout.state_folder(config.state_dir))
    if sample is None:
        raise DataError(f"{layout.name} has no sample to answer; draw one: sortd audit --dataset {layout.name}")
    return sample


def show_sample(config: Config, dataset: str | None, size: int | None, page: Path | None, *, as_json: bool) -> None:
    """Draw a sample, or take the open one, print it, and write its page."""
    check_page_path(page)
    layout = dataset_named(config, dataset)
    sample = draw_sample(config, layout, size)
    size = len(sample.images)
    facts = {
        "dataset": layout.name,
        "root": str(layout.root),
        **asdict(sample),
        "if_none_is_wrong": proportion(size, size),
    }
    if page is not None:
        pictures = thumbnails(image["path"] for image in sample.images)
        write_page(page, render("audit.html", datetime.now().astimezone(), facts=facts, images=pictures))
    show(facts, _print_sample, as_json=as_json)


def show_answers(config: Config, dataset: str | None, wrong: Sequence[Path], *, as_json: bool) -> None:
    """Record the answers to a sample and print what they prove."""
    show(answer_sample(config, dataset_named(config, dataset), wrong), _print_answers, as_json=as_json)


def _print_sample(facts: Mapping[str, Any]) -> None:
    size, name = len(facts["images"]), printable(facts["dataset"])
    drawn = f"{counted(size, 'image')} drawn at random from {facts['unchecked']:,} filed and not checked"
    print_line(f"{name}: {drawn} ({format_time(facts['drawn_at'])})", style="bold")
    print_table(("class", "image"), [(one["label"], one["path"]) for one in facts["images"]])
    say("sortd: look at each of them (--page FILE shows them); then name the wrong ones, and move them to their class:")
    command = f"sortd audit --dataset {name}"
    say(f"sortd: {command} --wrong PATH --wrong PATH; or, if none is wrong: {command} --all-right")
    say(f"sortd: if none is wrong, that proves {proven(size, size)}")


def _print_answers(facts: Mapping[str, Any]) -> None:
    for one in facts["wrong"]:
        print_line(
            f"wrong: {printable(one['path'])}; move it from {printable(one['label'])} to its class", style="yellow"
        )
    for path in facts["gone"]:
        print_line(f"counted as wrong, since it is not there any more: {printable(path)}", style="yellow")
    for what, one in (("in this sample", facts["sample"]), ("in all samples", facts["all"])):
        print_line(f"{what} right: {out_of(one['right'], one['judged'])}")
    print_line(f"{printable(facts['dataset'])}: {facts['all']['words']} of the filed images right", style="bold")
