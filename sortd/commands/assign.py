"""The command ``assign``: images in Review/ or Dataset/ go to the class that a person names, or to none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from sortd.commands.console import counted, printable, say, show
from sortd.commands.moves import dataset_at, print_moves
from sortd.config import Config
from sortd.daemon.assign import assign_images, assigned_label_problem, image_facts
from sortd.daemon.control import ask
from sortd.daemon.corrections import record_places
from sortd.daemon.dataset_lock import lock_dataset
from sortd.errors import DataError
from sortd.events import NO_CLASS
from sortd.layout import Layout
from sortd.watch.scan import stamp


def assign_to_class(
    config: Config, layout: Layout, label: str, images: Sequence[Mapping[str, Any]], *, is_example: bool = False
) -> dict[str, Any]:
    """Assign images to a class, by the running sortd or in this process; return the reply as ``daemon.control`` has it.

    ``images`` are as ``image_facts`` returns them; one that changed since is not moved. With the label ``NO_CLASS`` and
    ``is_example`` they become examples of no class.

    Raises:
        DataError: the class cannot have this name, or no image is named.
        SortdError: the dataset is not there, or another sortd works on it.
    """
    if (problem := assigned_label_problem(label, is_example=is_example)) is not None:
        raise DataError(problem)
    request = {"do": "assign", "dataset": layout.name, "root": str(layout.root), "label": label, "images": images}
    asked = {**request, "example": is_example}
    reply = ask(config.state_dir, asked, images=len(images))
    return _assign_here(config, layout, label, images, is_example=is_example) if reply is None else reply


def _assign_here(
    config: Config, layout: Layout, label: str, images: Sequence[Mapping[str, Any]], *, is_example: bool
) -> dict[str, Any]:
    with lock_dataset(layout, config.state_dir, companions=config.dataset(layout.name).companions) as opened:
        opened.presence.require()
        move_all = opened.mover.move_all
        steps = list(assign_images(layout, opened.journal, move_all, label, images, is_example=is_example))
        results = [one for some, _ in steps for one in some]
        record_places(layout, opened.journal, [one["destination"] for one in results if one["destination"] is not None])
    return {"assigned": results, "later": sum(later for _, later in steps)}


def assign_paths(config: Config, paths: Sequence[Path], label: str, *, is_example: bool, as_json: bool) -> None:
    """Assign the images with these paths, all of one dataset, and print what was moved; exit with 65 if one was not.

    Raises:
        DataError: a path is no file of a dataset, or lies in another dataset than the first; nothing was moved.
        SortdError: the dataset is not there, or another sortd works on it.
    """
    layout, images = _images_at(config, paths)
    reply = assign_to_class(config, layout, label, images, is_example=is_example)
    show({"dataset": layout.name, "label": label, "example": is_example, **reply}, print_assigned, as_json=as_json)
    raise typer.Exit(65 if any(one["destination"] is None for one in reply["assigned"]) else 0)


def _images_at(config: Config, paths: Sequence[Path]) -> tuple[Layout, list[dict[str, object]]]:
    """Return the dataset of these files, and the files as a request has them."""
    layouts: dict[Path, Layout] = {}
    images = []
    for path in paths:
        if (found := dataset_at(config, path)) is None:
            raise DataError(f"{path} lies in no dataset below {config.root}")
        layout, relative = found
        layouts[layout.root] = layout
        images.append(facts_at(f"{layout.root}/{relative}"))
    if len(layouts) > 1:
        names = ", ".join(sorted(layout.name for layout in layouts.values()))
        raise DataError(f"the images are in several datasets ({names}); assign those of each one in a call of its own")
    (layout,) = layouts.values()
    return layout, images


def facts_at(path: str) -> dict[str, object]:
    """Return a file as a request has it; raise DataError if it cannot be read or is none."""
    try:
        version = stamp(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if version is None:
        raise DataError(f"{path} is not a file")
    return image_facts(path, version)


def print_assigned(reply: Mapping[str, Any]) -> None:
    """Print what was assigned, from the reply with its ``label``."""
    done = print_moves(((one["path"], one["destination"], one["message"]) for one in reply["assigned"]), "not moved")
    to, use = f"to {printable(reply['label'])}", ", used as references where they lie"
    if reply["label"] == NO_CLASS:
        to, use = "to no class", ", used as examples of no class where they lie" if reply.get("example") else ""
    said = f"sortd: {counted(done, 'image')} assigned {to}"
    say(f"{said}{use}; to take them back: sortd undo --last {done}" if done else said)
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} still to be copied to another file system")
