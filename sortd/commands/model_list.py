"""The list of models: which are on this machine, which one the configuration means and why, and who decides."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sortd.commands.backend import backend_facts
from sortd.commands.promotion import finetuned_list
from sortd.config import Config
from sortd.encoding import models
from sortd.encoding.model_folders import STRONGER, ModelFolder, Use
from sortd.errors import ModelError
from sortd.status import read_status

CONTENT_DIGITS = 16
"""Of the sha256 over configuration and weights: enough to tell two models apart."""


def model_list(
    config: Config, *, environment: Mapping[str, str] = os.environ, packaged: Path = models.PACKAGED
) -> dict[str, Any]:
    """Return the facts as plain values; nothing is loaded and nothing is downloaded.

    Args:
        config: which model is wanted and where sortd's cache is.
        environment: where the caches of the hub's own client are looked up.
        packaged: the folder of the packaged model.
    """
    rows = [
        _row(one.name, Path(one.folder), one.kind, one.size_bytes, config, environment, packaged)
        for one in models.available(cache_dir=config.cache_dir, environment=environment, packaged=packaged)
    ]
    problem, chosen = None, None
    try:
        chosen = models.locate(config.model, cache_dir=config.cache_dir, environment=environment, packaged=packaged)
    except ModelError as error:
        problem = str(error)
    if chosen is not None and str(chosen.folder) not in {row["folder"] for row in rows}:
        rows.append(_row(chosen.name, chosen.folder, chosen.kind, chosen.size_bytes, config, environment, packaged))
    for row in rows:
        row["chosen"] = chosen is not None and row["folder"] == str(chosen.folder)
    status = read_status(config.state_dir)
    running = None
    if status is not None and status["alive"]:
        running = {"model": status.get("model"), "encoder_id": status.get("encoder_id")}
    return {
        "model": config.model,
        "models": rows,
        "problem": problem,
        "why": problem or _why(config.model, chosen),
        "advice": _advice(config.model, chosen),
        "backend": backend_facts(config),
        "running": running,
        "datasets": finetuned_list(config),
    }


def _row(
    name: str,
    folder: Path,
    kind: str,
    size_bytes: int,
    config: Config,
    environment: Mapping[str, str],
    packaged: Path,
) -> dict[str, Any]:
    content = None
    with suppress(ModelError, OSError):
        model = models.locate(
            "packaged" if folder == packaged else str(folder.absolute()),
            cache_dir=config.cache_dir,
            environment=environment,
            packaged=packaged,
        )
        content = models.digest(model, cache_dir=config.cache_dir)[:CONTENT_DIGITS]
    return {"name": name, "folder": str(folder), "kind": kind, "size_bytes": size_bytes, "content": content}


def _why(wanted: str, chosen: ModelFolder | None) -> str:
    if wanted != "auto" or chosen is None:
        return f"`model: {wanted}` says which one is used"
    if chosen.name == "packaged":
        return f"`model: auto` takes the packaged one, since {STRONGER} is not on this machine"
    return f"`model: auto` takes {chosen.name}, which is stronger than the packaged one, since it is on this machine"


def _advice(wanted: str, chosen: ModelFolder | None) -> list[str]:
    if chosen is not None and chosen.name == "packaged" and wanted == "auto":
        return [
            f"To have the stronger one, where there is a network: sortd models fetch {STRONGER}",
            "Without a network: copy its folder from another machine and set `model:` to its path",
        ]
    return []


def how_to_use(name: str, use: Use, config: Config) -> str:
    """Return, in a sentence, what a model that is on this machine now is for, and how to have it used."""
    again = "in the configuration, and start sortd again"
    match use:
        case Use.IMAGES:
            return (
                f"it sees images and knows no words, so it cannot be `model:`; it can be taught your classes: "
                f"`sortd finetune DATASET --base {name}`"
            )
        case Use.WORDS if config.text_model == name:
            return "`text_model:` names it: it reads the classes' names from the next start on"
        case Use.WORDS:
            return (
                f"it reads text and sees no images; beside the CLIP that it was taught with it reads the classes' "
                f"names: `text_model: {name}` {again}"
            )
    if config.model == name or (config.model == "auto" and name == STRONGER):
        return f"`model: {config.model}` takes it from the next start on"
    return f"to use it: `model: {name}` {again}"
