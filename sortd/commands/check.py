"""The check: everything that can be said about a configuration and its folders before sortd runs, as findings.

Nothing is changed: own trial files come and go in Images/ (hidden), ``.sortd/`` and sortd's own folders; Clases/ is
only read. Nothing here imports torch.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from sortd import mends
from sortd.cache import Cache
from sortd.classify.types import Mode
from sortd.commands.check_calibration import calibration_findings
from sortd.commands.check_disks import clock_findings, file_system_findings, room_findings, watching_findings
from sortd.commands.check_folders import dataset_findings, overlap_findings, own_folder_findings, root_findings
from sortd.commands.check_references import DECODING_SECONDS, File, Reader, reference_findings
from sortd.commands.check_running import (
    classifier_findings,
    decoder_findings,
    journal_findings,
    model_findings,
    named_dataset_findings,
    process_findings,
)
from sortd.commands.finding import Finding, Topic, error, warning
from sortd.commands.journals import JOURNAL_FILE
from sortd.commands.model_facts import backend_findings
from sortd.commands.stored import changed_since, evaluated_prototypes, stored_prototypes
from sortd.config import Config, load
from sortd.errors import ConfigError, JournalError, LayoutError
from sortd.images.decode import DecodeLimits, check_header, decode_file
from sortd.journaling.history import History
from sortd.layout import Layout, find_datasets
from sortd.messages import Preprocessing

CACHE_FILE = "embeddings.sqlite"
SIDE_PIXELS = 224
"""What most encoders see: references are decoded as far as it takes to come to this size."""


def check(path: Path | None, environment: Mapping[str, str], *, thorough: bool = False) -> Iterator[Finding]:
    """Yield all findings, the configuration's first: with a wrong one there is nothing else to look at.

    Args:
        path: the configuration's file, or None to search for one.
        environment: where variables are looked up.
        thorough: decode every reference, however long that takes.
    """
    try:
        config = load(path, environment)
    except ConfigError as mistakes:
        for line in str(mistakes).splitlines():
            yield error(Topic.CONFIGURATION, "configuration", line)
        return
    yield from check_site(config, decoding_seconds=float("inf") if thorough else DECODING_SECONDS)


def check_site(config: Config, *, decoding_seconds: float = DECODING_SECONDS) -> Iterator[Finding]:
    """Yield the findings about everything that a valid configuration points at."""
    try:
        layouts = find_datasets(config.root)
    except LayoutError:
        layouts = []  # the root's own check says why
    own = {"state_dir": config.state_dir, "cache_dir": config.cache_dir}
    yield from _told(root_findings(config.root, layouts))
    yield from named_dataset_findings(config, layouts)
    for key, folder in own.items():
        yield from _told(own_folder_findings(key, folder))
    if config.metrics.textfile is not None:
        yield from _told(own_folder_findings("metrics.textfile", config.metrics.textfile.parent))
    yield from _told(overlap_findings(layouts, own))
    yield from _told(process_findings(config, layouts))
    yield from _told(model_findings(config))
    yield from decoder_findings()
    yield from _told(backend_findings(config))
    yield from _told(watching_findings(layouts, config.polling))
    yield from clock_findings()
    rooms = [("the journal", config.state_dir), ("the cache", config.cache_dir)]
    yield from _told(room_findings([*(("images", layout.root) for layout in layouts), *rooms]))
    with ExitStack() as stack:
        known = _known_contents(config, stack)
        decode, look = _readers(config)
        for layout in layouts:
            own_config = config.dataset(layout.name)
            yield from _told(dataset_findings(layout))
            yield from _told(file_system_findings(layout))
            yield from _told(journal_findings(config, layout))
            references = reference_findings(
                layout, Mode(own_config.mode), known=known, decode=decode, look=look, decoding_seconds=decoding_seconds
            )
            yield from _told(references)
            yield from _told(classifier_findings(config, layout))
            yield from _told(_calibrated(config, layout))
            yield from _told(_held(config, layout))


def _told(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield some findings; what they may not look at is one more of them, and the others are told all the same."""
    try:
        yield from findings
    except OSError as refusal:
        what = f"cannot be looked at: {refusal.strerror or refusal}"
        mend = mends.to_read(refusal)
        if isinstance(refusal, PermissionError):
            mend = "mend its rights, or check as the user that sortd runs as: sudo -u USER sortd check"
        yield error(Topic.FOLDERS, refusal.filename, what, mend)


def _held(config: Config, layout: Layout) -> Iterator[Finding]:
    """Tell of a dataset that the guard holds, by its journal; whether that can be read is another question."""
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not file.is_file():
        return
    with suppress(JournalError), History.open(file) as history:
        if reason := history.guard().reason:
            mend = f"look at `sortd eval`, then `sortd release {layout.root}`"
            yield warning(Topic.CALIBRATION, layout.root, f"is held, so that nothing moves: {reason}", mend)


def _calibrated(config: Config, layout: Layout) -> Iterator[Finding]:
    served, evaluated = stored_prototypes(config, layout), evaluated_prototypes(config, layout)
    changed = None if served is None else changed_since(config, layout, served)
    if evaluated is not None and (served is None or changed is not None):
        since = changed_since(config, layout, evaluated, evaluated=True)
        if served is None or since is None:
            served, changed = evaluated, since
    yield from calibration_findings(layout, config.dataset(layout.name), served, changed=changed)


def _readers(config: Config) -> tuple[Reader, Reader]:
    """Return what decodes a whole reference, and what looks at its header alone, under the configured limits."""
    allowed = config.decoding
    limits = DecodeLimits(max_pixels=allowed.max_pixels, max_side=allowed.max_side_pixels, max_bytes=allowed.max_bytes)
    seen = Preprocessing(shortest_edge=SIDE_PIXELS, crop_height=SIDE_PIXELS, crop_width=SIDE_PIXELS)

    def decode(path: str) -> None:
        decode_file(path, seen, limits)

    def look(path: str) -> None:
        check_header(path, limits)

    return decode, look


def _known_contents(config: Config, stack: ExitStack) -> Callable[[Sequence[File]], Mapping[File, str]]:
    """Return what tells the content of files that were read before; a cache that is not there is not made."""
    file = config.cache_dir / CACHE_FILE
    if not os.path.isfile(file):  # False too where it may not be looked at, which another finding says
        return lambda _: {}
    return stack.enter_context(Cache(file, report=lambda _: None)).contents
