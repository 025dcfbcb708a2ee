"""Exporting: the configured model is written for ONNX Runtime, and whoever waits for that is told so.

Commands that keep no log say on stderr what the daemon logs, for stdout is for facts.
"""

import logging
from time import monotonic
from typing import Any

import structlog

from sortd import logs
from sortd.config import Config
from sortd.encoding import exports, models
from sortd.encoding.export_process import Tell, export_seconds
from sortd.encoding.exports import Exports
from sortd.encoding.model_folders import ModelFolder


def located(config: Config) -> tuple[ModelFolder, ModelFolder | None]:
    """Return the configured model, and the one for words where that is another.

    Raises:
        ModelError: it is not on this machine.
    """
    model = models.locate(config.model, cache_dir=config.cache_dir)
    words = None if config.text_model is None else models.locate_text(config.text_model, cache_dir=config.cache_dir)
    return model, words


def export(config: Config, *, attend: Tell = lambda _: None) -> Exports:
    """Export the configured model, unless a sound export stands; log that it begins, each step, and what it took.

    Args:
        config: the model.
        attend: is told what is under way, twice a second.

    Raises:
        ModelError: it cannot be exported here.
    """
    exports.see_that_it_is_installed()
    model, words = located(config)
    found = exports.find(model, words, cache_dir=config.cache_dir)
    if found is not None:
        return found
    exports.see_that_it_can_export()
    about, began = export_seconds(model, words), monotonic()
    said: set[str] = set()

    def tell(step: str) -> None:
        attend(f"exporting {model.name} to ONNX, about {about} s in all: {step}")
        if step not in said:
            said.add(step)
            note(logs.MODEL_EXPORTING, model=model.name, step=step, about_seconds=about)

    if not structlog.is_configured():
        logging.getLogger(__name__).warning("exporting %s to ONNX, once; that takes about %d s", model.name, about)
    made = exports.make(model, words, cache_dir=config.cache_dir, tell=tell)
    note(
        logs.MODEL_EXPORTED,
        model=model.name,
        folder=str(made.folder),
        megabytes=round(made.size_bytes / 1e6),
        precisions=[one.value for one in made.precisions],
        int8_gain=round(made.manifest.gain, 2),
        seconds=round(monotonic() - began, 1),
    )
    return made


def note(event: str, **fields: Any) -> None:  # noqa: ANN401 -- the values of a log line
    """Log; commands that keep no log say nothing."""
    if structlog.is_configured():
        structlog.get_logger().info(event, **fields)


def warn(event: str, **fields: Any) -> None:  # noqa: ANN401 -- the values of a log line
    """Log as a warning; commands that keep no log say it on stderr."""
    if structlog.is_configured():
        structlog.get_logger().warning(event, **fields)
    else:
        logging.getLogger(__name__).warning("%s: %s", event, fields.get("refusal") or fields.get("error"))
