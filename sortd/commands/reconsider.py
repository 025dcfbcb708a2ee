"""The command ``reconsider``: which filed images the present references would file elsewhere, and their moves.

Only images that are where sortd filed them count, and of these only those that no person corrected or judged in an
audit, and for which no person took back such a move. Nothing is moved without a request.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import typer

from sortd.arrays import FloatArray
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import Classifier, PrototypeSet
from sortd.commands.console import counted, decimals, print_line, print_table, printable, say, show, spinner
from sortd.commands.explain import stored_rows
from sortd.commands.groups import embed_missing, embedded_rows
from sortd.commands.moves import File, files_in, journal_of
from sortd.commands.status import chosen_datasets
from sortd.config import Config
from sortd.daemon.control import ask
from sortd.daemon.dataset_lock import OpenDataset, lock_dataset, simulate_dataset
from sortd.daemon.references import class_labels, stored_prototypes
from sortd.daemon.refile import filed_record, refile_facts, refile_images
from sortd.daemon.resources import LoadEncoder, Resources, reference_settings_of, select_classifier
from sortd.errors import DataError
from sortd.events import Assigned, ImageRefused, Outcome
from sortd.layout import Area, Layout
from sortd.store.history import History
from sortd.store.records import UNDONE, Record, Selection

AT_ONCE = 2_000  # images decided in one call
MOST_IN_A_REQUEST = 1_000
Filed = dict[File, Record]
"""By file: the record of the move by which sortd filed it."""
Refile = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Returns ``refiled`` and ``later``, as the answer to a request."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """An image that would be filed into another class now."""

    file: File
    record: Record
    decision: Assigned
    content: str

    def facts(self) -> dict[str, Any]:
        """Return the proposal as plain values."""
        return {
            "id": self.record.id,
            "path": self.file[0],
            "from": self.record.move_reason.label,
            "to": self.decision.label,
            "then": self.record.move_reason.score,
            "now": self.decision.score,
            "margin": self.decision.margin,
            "second_label": self.decision.second_label,
            "mode": str(self.decision.mode),
        }


@dataclass(frozen=True, slots=True)
class ReconsideredDataset:
    """The filed images of one dataset, decided again."""

    layout: Layout
    considered: int = 0
    abstained: int = 0  # images that would go to Review/ now
    proposals: tuple[Proposal, ...] = ()
    unreadable: tuple[ImageRefused, ...] = ()
    encoder_id: str = ""
    generation: int = 0

    def facts(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "root": str(self.layout.root),
            "considered": self.considered,
            "abstained": self.abstained,
            "proposals": [one.facts() for one in self.proposals],
            "unreadable": [{"path": one.path, "message": one.message} for one in self.unreadable],
        }

    @property
    def images(self) -> list[dict[str, object]]:
        """The proposals as a request has them."""
        return [
            refile_facts(
                *one.file,
                one.decision,
                content=one.content,
                encoder_id=self.encoder_id,
                generation=self.generation,
            )
            for one in self.proposals
        ]


def reconsider_datasets(
    config: Config, dataset: str | None = None, *, load_encoder: LoadEncoder | None = None
) -> Iterator[ReconsideredDataset]:
    """Yield the result of one dataset or of all; a model is loaded only for images whose embedding is not stored.

    Raises:
        DataError: there is no such dataset, or a dataset with filed images has no references.
        JournalError: a journal cannot be read.
        ModelError: the model is not available.
    """
    chosen = chosen_datasets(config, dataset)
    with Resources(config, load_encoder=load_encoder) as resources:
        for layout in chosen:
            yield _reconsidered(config, layout, resources)


def _reconsidered(config: Config, layout: Layout, resources: Resources) -> ReconsideredDataset:
    filed = _filed_images(config, layout)
    if not filed:
        return ReconsideredDataset(layout)
    contents = {file: record.move_reason.content for file, record in filed.items() if record.move_reason.content}
    classifier, rows, unreadable = _classifier_and_rows(config, layout, list(filed), contents, resources)
    sources = set(classifier.sources) if isinstance(classifier, PrototypeSet) else set[str]()
    known = [file for file in filed if file in contents and file[0] not in sources]
    proposals, abstained = [], 0
    for start in range(0, len(known), AT_ONCE):
        part = known[start : start + AT_ONCE]
        decisions = decide_by(classifier, np.array([rows[contents[file]] for file in part], np.float64))
        for file, decision in zip(part, decisions, strict=True):
            if not isinstance(decision, Assigned):
                abstained += 1
            elif decision.label != filed[file].move_reason.label:
                proposals.append(Proposal(file, filed[file], decision, contents[file]))
    return ReconsideredDataset(
        layout=layout,
        considered=len(known),
        abstained=abstained,
        proposals=tuple(sorted(proposals, key=lambda one: -one.decision.confidence)),
        unreadable=unreadable,
        encoder_id=classifier.encoder_id,
        generation=classifier.generation,
    )


def _filed_images(config: Config, layout: Layout) -> Filed:
    """Return the images that are where sortd filed them, without those about which a person said something."""
    filed: Filed = {}
    with journal_of(config, layout).open() as history:
        unchecked, taken_back = set(history.to_audit()), _taken_back(history)
        for path, mark in files_in(layout.area(Area.DATASET)) if unchecked else ():
            record = filed_record(layout, history.last_known(mark), path)
            if record is not None and record.id in unchecked and record.move_reason.content not in taken_back:
                filed[path, mark] = record
    return filed


def _taken_back(history: History) -> set[str]:
    """Return the contents of images whose move to another class was undone."""
    undone = [one.move_reason.undoes for one in history.moves(Selection(outcome=UNDONE))]
    records = history.finished([identifier for identifier in undone if identifier is not None])
    return {one.move_reason.content for one in records if one.move_reason.outcome == Outcome.REFILED} - {""}


def _classifier_and_rows(
    config: Config, layout: Layout, files: Sequence[File], contents: dict[File, str], resources: Resources
) -> tuple[Classifier, dict[str, FloatArray], tuple[ImageRefused, ...]]:
    """Return what decides in a dataset, its rows by content, and refusals; complete ``contents``."""
    own = config.dataset(layout.name)
    labels = class_labels(layout.area(Area.CLASES))
    decider = select_classifier(layout, config.state_dir, own.classifier, labels)
    if decider.facts is None:
        return embedded_rows(config, layout, files, contents, resources)
    rows, refused = stored_rows(config, contents.values(), decider.model_id), tuple[ImageRefused, ...]()
    if missing := [file for file in files if contents.get(file, "") not in rows]:
        resources.embedder()  # first, since it opens the cache
        decider = resources.select(layout, own.classifier, labels)
        if decider.facts is None:
            raise DataError(decider.refusal or f"{layout.name}: the fine-tuned model cannot be used")
        refused = embed_missing(resources.finetuned[decider.model_id], missing, contents, rows)
    stored = stored_prototypes(config, layout)
    generation = 0 if stored is None else stored.generation
    classifier = decider.classifier(reference_settings_of(own).settings.abstain, generation=generation)
    assert classifier is not None
    return classifier, rows, refused


def apply_proposals(config: Config, found: ReconsideredDataset) -> dict[str, Any]:
    """Move the proposed images, by the running sortd or in this process, and return the outcome as plain values.

    Raises SortdError: the dataset is not there, or another sortd works on it.
    """
    refiled, later = list[dict[str, Any]](), 0
    with refiling(config, found.layout) as refile:
        for start in range(0, len(found.images), MOST_IN_A_REQUEST):
            reply = refile(found.images[start : start + MOST_IN_A_REQUEST])
            refiled, later = refiled + reply["refiled"], later + reply["later"]
    return {"refiled": refiled, "later": later}


@contextmanager
def refiling(config: Config, layout: Layout, *, dry_run: bool = False) -> Iterator[Refile]:
    """Yield a function that moves images, at most ``MOST_IN_A_REQUEST``, to classes; see ``refile_images``.

    It asks the running sortd, and without one takes the dataset's lock, until the block ends. A dry run only answers.

    Raises:
        SortdError: from the function: the dataset is not there, or another sortd works on it.
    """
    opened: OpenDataset | None = None
    with ExitStack() as stack:

        def refile(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            nonlocal opened
            if opened is None and not dry_run:
                request = {"do": "refile", "dataset": layout.name, "root": str(layout.root), "images": images}
                if (reply := ask(config.state_dir, request, images=len(images))) is not None:
                    return reply
            if opened is None:
                companions = config.dataset(layout.name).companions
                opened = stack.enter_context(
                    simulate_dataset(layout, config.state_dir, lambda *_: None)
                    if dry_run
                    else lock_dataset(layout, config.state_dir, companions=companions)
                )
            opened.presence.require()
            steps = list(refile_images(layout, opened.journal.history, opened.mover.move_all, images))
            return {"refiled": [one for results, _ in steps for one in results], "later": sum(n for _, n in steps)}

        yield refile


def show_reconsidered(config: Config, dataset: str | None, *, apply: bool, as_json: bool) -> None:
    """Print the proposals, and with ``apply`` carry them out; exit with 65 if an image was not moved."""
    with spinner("reading the images"):
        found = list(reconsider_datasets(config, dataset))
    facts: dict[str, Any] = {"applied": apply, "datasets": {one.layout.name: one.facts() for one in found}}
    if apply:
        for one in found:
            facts["datasets"][one.layout.name] |= apply_proposals(config, one)
    show(facts, _print_reconsidered, as_json=as_json)
    moved = [one for facts in facts["datasets"].values() for one in facts.get("refiled", ())]
    raise typer.Exit(65 if any(one["destination"] is None for one in moved) else 0)


def _print_reconsidered(facts: Mapping[str, Any]) -> None:
    for name, dataset in facts["datasets"].items():
        _print_dataset(name, dataset, is_applied=facts["applied"])
    proposed = sum(len(dataset["proposals"]) for dataset in facts["datasets"].values())
    if proposed and not facts["applied"]:
        say(f"sortd: nothing was moved; to move {counted(proposed, 'image')}: sortd reconsider --apply")


def _print_dataset(name: str, facts: Mapping[str, Any], *, is_applied: bool) -> None:
    considered = counted(facts["considered"], "filed image")
    print_line(f"{printable(name)}: {considered} decided again", style="bold")
    rows = [
        (one["path"], one["from"], one["to"], decimals(one["then"]), decimals(one["now"])) for one in facts["proposals"]
    ]
    if rows:
        print_table(("image", "class", "new class", "then", "now"), rows, right=("then", "now"))
    elif facts["considered"]:
        print_line("  none would be filed into another class")
    if facts["abstained"]:
        print_line(f"  {facts['abstained']:,} of {facts['considered']:,} would go to Review today; they stay")
    for one in facts["unreadable"]:
        print_line(f"  cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")
    if is_applied:
        _print_moved(facts)


def _print_moved(facts: Mapping[str, Any]) -> None:
    for one in facts["refiled"]:
        if one["destination"] is None:
            print_line(f"  not moved: {printable(one['message'])}", style="yellow")
    done = sum(one["destination"] is not None for one in facts["refiled"])
    say(f"sortd: {counted(done, 'image')} moved" + (f"; to take them back: sortd undo --last {done}" if done else ""))
    if facts["later"]:
        say(f"sortd: {counted(facts['later'], 'image')} still to be copied to another file system")
