"""The command ``groups``: groups of the images in Review/, shown on a page, and accepted as a class."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import typer

from sortd.arrays import Array, FloatArray
from sortd.classify.groups import ImageGroup, find_groups, next_to_label, whitened_rows
from sortd.classify.prototypes import PrototypeSet
from sortd.commands.assign import assign_to_class, print_assigned
from sortd.commands.check_dataset import FEW_REFERENCES, listed
from sortd.commands.console import counted, decimals, print_line, print_table, printable, say, show, spinner
from sortd.commands.evaluation import check_page_path, render, write_page
from sortd.commands.explain import current_prototypes, stored_rows
from sortd.commands.findings import Finding, note
from sortd.commands.moves import File, files_in, journal_of, without_links
from sortd.commands.status import chosen_datasets, settings_with_corrections
from sortd.companions import is_image
from sortd.config import Config
from sortd.daemon.assign import image_facts
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import References, class_name_problem
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.errors import DataError
from sortd.events import EmbeddedImage, ImageRefused
from sortd.files import sha256_of
from sortd.images.thumbnails import thumbnails
from sortd.layout import Area, Layout
from sortd.watch.scan import whole_files

NEXT_AT_MOST = 24
"""Largest number of images that are proposed to be labelled next; otherwise one for each class."""
CHECKED_AT_MOST = 1500
"""Images that `sortd check` chooses from."""
PICTURES_OF_GROUP = 60
PICTURES_OF_PAGE = 1200
"""Largest number of pictures of a page; the largest groups have theirs first."""


@dataclass(frozen=True, slots=True)
class GroupedPile:
    """The images in Review/ of one dataset, and their groups."""

    layout: Layout
    files: tuple[File, ...]
    groups: tuple[ImageGroup, ...]
    next_to_label: tuple[str, ...]
    unreadable: tuple[ImageRefused, ...]

    def facts(self) -> dict[str, Any]:
        """Return the groups as plain values."""
        return {
            "root": str(self.layout.root),
            "waiting": len(self.files),
            "alone": len(self.files) - sum(group.size for group in self.groups),
            "groups": [
                {**asdict(group), "size": group.size, "members": [self.files[at][0] for at in group.members]}
                for group in self.groups
            ],
            "next_to_label": list(self.next_to_label),
            "unreadable": [{"path": one.path, "message": one.message} for one in self.unreadable],
        }


def group_piles(
    config: Config, dataset: str | None = None, *, load_encoder: LoadEncoder | None = None
) -> Iterator[GroupedPile]:
    """Yield the groups of one dataset or of all; a model is loaded only for images whose embedding is not stored.

    Raises:
        DataError: there is no such dataset, or a dataset with images in Review/ has no references.
        UnreadableError: Review/ cannot be read.
        ModelError: the model is not available.
    """
    chosen = chosen_datasets(config, dataset)
    with Resources(config, load_encoder=load_encoder) as resources:
        for layout in chosen:
            yield _grouped(config, layout, resources)


def _grouped(config: Config, layout: Layout, resources: Resources) -> GroupedPile:
    found = files_in(layout.area(Area.REVIEW))
    contents = _journaled_contents(config, layout, found)
    files = [file for file in found if file in contents or is_image(file[0])]
    if not files:
        return GroupedPile(layout, (), (), (), ())
    prototypes, rows, unreadable = embedded_rows(config, layout, files, contents, resources)
    known = tuple(file for file in files if file in contents)
    matrix = np.array([rows[contents[file]] for file in known], np.float64).reshape(len(known), -1)
    return GroupedPile(
        layout=layout,
        files=known,
        groups=tuple(find_groups(prototypes, matrix, [contents[file] for file in known])) if known else (),
        next_to_label=tuple(known[at][0] for at in _next(prototypes, matrix)) if known else (),
        unreadable=unreadable,
    )


def _next(prototypes: PrototypeSet, matrix: Array) -> list[int]:
    """Return the images to label next where classes have few references on average; none otherwise."""
    if not _has_few_references(prototypes):
        return []
    return next_to_label(whitened_rows(prototypes, matrix), min(len(prototypes.labels), NEXT_AT_MOST))


def _has_few_references(prototypes: PrototypeSet) -> bool:
    return len(prototypes.labels) > 0 and float(prototypes.counts.mean()) < FEW_REFERENCES


def label_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Name the images in Review/ to label next while the classes have few references; nothing is embedded for it."""
    prototypes, review = current_prototypes(config, layout), layout.area(Area.REVIEW)
    if prototypes is None or not _has_few_references(prototypes) or not review.is_dir():
        return
    found = whole_files(os.fspath(review), report=lambda _: None)
    contents = _journaled_contents(config, layout, found[:: 1 + len(found) // CHECKED_AT_MOST])
    rows = stored_rows(config, contents.values(), prototypes.encoder_id)
    known = [(path, rows[content]) for (path, _), content in contents.items() if content in rows]
    if known:
        asked = _next(prototypes, np.array([row for _, row in known], np.float64))
        named = listed([os.path.relpath(known[at][0], review) for at in asked])
        what = f"holds images that are best labelled next, since the classes have few references: {named}"
        yield note(review, what, "move them into their classes in Clases/; `sortd groups --page FILE` shows them")


def embedded_rows(
    config: Config, layout: Layout, files: Sequence[File], contents: dict[File, str], resources: Resources
) -> tuple[PrototypeSet, dict[str, FloatArray], tuple[ImageRefused, ...]]:
    """Return prototypes, embeddings by content, and refusals; in ``contents``, complete those of the readable files."""
    prototypes = current_prototypes(config, layout)
    for file in files:
        with suppress(OSError):  # the embedder says why
            contents[file] = contents.get(file) or sha256_of(file[0])
    rows = {} if prototypes is None else stored_rows(config, contents.values(), prototypes.encoder_id)
    missing = [file for file in files if contents.get(file, "") not in rows]
    if prototypes is not None and not missing:
        return prototypes, rows, ()
    embedder = resources.embedder()
    if prototypes is None or prototypes.encoder_id != embedder.encoder.encoder_id:
        rows, missing = {}, list(files)
        references = References(layout.area(Area.CLASES))
        settings = settings_with_corrections(config, layout)
        prototypes = references.rebuild(embedder, settings, previous=None, generation=0).prototypes
    return prototypes, rows, embed_missing(embedder, missing, contents, rows)


def embed_missing(
    embedder: Embedder, missing: Sequence[File], contents: dict[File, str], rows: dict[str, FloatArray]
) -> tuple[ImageRefused, ...]:
    """Add the contents and embeddings of files; remove the contents of those that cannot be read, and return these."""
    refused = []
    for answer in embedder.embed(missing):
        file = (answer.path, answer.stamp)
        if isinstance(answer, EmbeddedImage):
            contents[file], rows[answer.content] = answer.content, answer.embedding
        else:
            contents.pop(file, None)
            refused.append(answer)
    return tuple(refused)


def _journaled_contents(config: Config, layout: Layout, files: Sequence[File]) -> dict[File, str]:
    """Return the sha256, in hexadecimal, of the images that sortd put where they are."""
    contents: dict[File, str] = {}
    with journal_of(config, layout).open() as history:
        for path, mark in files:
            record = history.last_known(mark)
            if record is not None and record.move_reason.content and f"{layout.root}/{record.destination_path}" == path:
                contents[path, mark] = record.move_reason.content
    return contents


def accept_group(
    config: Config, piles: Sequence[GroupedPile], identifier: str, label: str, without: Sequence[Path]
) -> dict[str, Any]:
    """Assign the members of a group, except ``without``, to a class; return the outcome as plain values.

    Raises:
        DataError: the group does not exist now, a path is not a member, or the class cannot have this name.
        SortdError: the dataset is not there, or another sortd works on it.
    """
    if (problem := class_name_problem(label)) is not None:
        raise DataError(f"{label!r} cannot be a class: {problem}")
    found = [(pile, group) for pile in piles for group in pile.groups if group.id == identifier]
    if not found:
        raise DataError(
            f"there is no group {identifier!r} now; a group that changed has another id: see `sortd groups`"
        )
    pile, group = found[0]
    members = [pile.files[at] for at in group.members]
    spelled = {without_links(path): path for path, _ in members}
    left_out = {spelled.get(without_links(path), os.path.abspath(path)) for path in without}
    if strange := sorted(left_out - {path for path, _ in members}):
        raise DataError(f"{strange[0]} is not in the group {identifier}")
    images = [image_facts(path, mark) for path, mark in members if path not in left_out]
    reply = assign_to_class(config, pile.layout, label, images)
    return {"dataset": pile.layout.name, "group": identifier, "label": label, **reply}


def show_groups(config: Config, dataset: str | None, page: Path | None, *, as_json: bool) -> None:
    """Print the groups of one dataset or of all, and write their page."""
    check_page_path(page)
    with spinner("reading the images"):
        piles = list(group_piles(config, dataset))
    facts = {pile.layout.name: pile.facts() for pile in piles}
    if page is not None:
        write_page(page, groups_page(facts, now=datetime.now().astimezone()))
    show({"datasets": facts}, _print_all_groups, as_json=as_json)


def accept(
    config: Config, dataset: str | None, identifier: str, label: str, without: Sequence[Path], *, as_json: bool
) -> None:
    """Make a class from a group and print what was moved; exit with 65 if an image was not."""
    with spinner("reading the images"):
        piles = list(group_piles(config, dataset))
    reply = accept_group(config, piles, identifier, label, without)
    show(reply, print_assigned, as_json=as_json)
    raise typer.Exit(65 if any(one["destination"] is None for one in reply["assigned"]) else 0)


def _print_all_groups(facts: Mapping[str, Any]) -> None:
    for one in facts["datasets"].items():
        _print_groups(*one)


def _print_groups(name: str, facts: Mapping[str, Any]) -> None:
    print_line(f"{printable(name)}: {counted(facts['waiting'], 'image')} in Review/", style="bold")
    rows = [
        (
            one["id"],
            one["size"],
            decimals(one["familiarity"], "+.2f"),
            one["nearest_label"],
            "yes" if one["is_new"] else "",
            one["members"][0],
        )
        for one in facts["groups"]
    ]
    if rows:
        columns = ("group", "images", "familiarity", "nearest class", "new class?", "most typical image")
        print_table(columns, rows, right=("images", "familiarity"))
        say("sortd: --page FILE shows the pictures; --accept ID --as NAME makes a class from a group")
    for path in facts["next_to_label"]:
        print_line(f"label next: {printable(path)}")
    for one in facts["unreadable"]:
        print_line(f"cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")


def groups_page(found: Mapping[str, Mapping[str, Any]], *, now: datetime) -> str:
    """Return the page of several datasets, from ``GroupedPile.facts`` by name."""
    shown: list[str] = []

    def pictures(paths: Sequence[str]) -> Sequence[str]:
        taken = paths[: min(PICTURES_OF_GROUP, PICTURES_OF_PAGE - len(shown))]
        shown.extend(taken)
        return taken

    datasets = [
        {
            **facts,
            "name": name,
            "next_to_label": pictures(facts["next_to_label"]),
            "groups": [{**group, "pictures": pictures(group["members"])} for group in facts["groups"]],
        }
        for name, facts in found.items()
    ]
    return render("groups.html", now, datasets=datasets, images=thumbnails(shown))
