"""A dataset at work: its core, and the hands that carry out what the core asks for.

Lives in the loop thread. Everything that enters is turned into events for the core; every command that comes out is
carried out here or handed to the worker. Moves are gathered and filed as one group a turn, since one pair of directory
syncs for fifty moves is eighty times as fast as one for each.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import monotonic
from typing import Protocol

import structlog

from sortd.layout import Area, Layout
from sortd.logs import (
    IMAGE_EVENTS,
    IMAGE_LEFT,
    MOVE_FAILED,
    PROTOTYPES_REBUILD_FAILED,
    PROTOTYPES_REBUILT,
    REFERENCES_EMPTIED,
    REFERENCES_MISNAMED,
    REFERENCES_UNREADABLE,
    SCAN_UNREADABLE,
)
from sortd.messages import (
    Command,
    Embed,
    Embedded,
    Event,
    ImageGone,
    ImageHeld,
    ImageSeen,
    Inspect,
    Leave,
    Move,
    Moved,
    MoveFailed,
    MoveFailure,
    Outcome,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    ReviewSeen,
    Scan,
    ScanFinished,
    ScanStarted,
    Stamp,
    Tick,
    Writer,
)
from sortd.metrics import Metrics
from sortd.prototypes import Abstained, Assigned
from sortd.references import Rebuilt, Teaching
from sortd.renaming import writer_of
from sortd.sorter import Sorter, SorterSettings
from sortd.watch import Hint, is_temporary, scan, stamp
from sortd.worker import Answer, EmbedJob, Job, RebuildJob

SCAN_SLICE = 2000
"""Files taken from a scan in one turn of the loop: about ten milliseconds."""


class Mover(Protocol):
    """Whatever carries out moves: ``Filing`` does, ``Rehearsal`` only says what it would do."""

    def move_all(self, moves: Sequence[Move]) -> list[Moved | MoveFailed]:
        """Carry out a group of moves and answer each."""


class Dataset:
    """One dataset's core, scans, moves and log lines."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        layout: Layout,
        settings: SorterSettings,
        teaching: Teaching,
        *,
        mover: Mover,
        ask: Callable[[Job], None],
        metrics: Metrics,
        last_generation: int,
    ) -> None:
        """Take the collaborators over; nothing is touched yet."""
        self.layout = layout
        self.name = layout.name
        self.sorter = Sorter(settings)
        self.teaching = teaching
        self.log: structlog.stdlib.BoundLogger = structlog.get_logger().bind(dataset=self.name)
        self.problem: str | None = None
        """Why nothing moves, in a sentence; None while all is well."""
        self.rebuilt: Rebuilt | None = None
        self.outcomes: dict[str, int] = {}
        self._mover, self._ask, self._metrics = mover, ask, metrics
        self._last_generation = last_generation
        self._commands: deque[Command] = deque()
        self._moves: list[Move] = []
        self._scan: Iterator[tuple[str, Stamp]] | None = None
        self._scan_again = False
        self._references_signature: int | None = None

    # ------------------------------------------------------------ what comes in

    def receive(self, event: Event) -> None:
        """Hand one event to the core and carry out what it asks for; moves wait for ``flush``."""
        self._commands.extend(self.sorter.receive(event, monotonic()))
        while self._commands:
            self._carry_out(self._commands.popleft())

    def begin(self, held: Sequence[tuple[str, Stamp]], reviewed: Sequence[tuple[str, Stamp, int]]) -> None:
        """Tell the core what the journal remembers, and begin the first scan."""
        for path, mark in held:
            self.receive(ImageHeld(path, mark))
        for path, mark, generation in reviewed:
            self.receive(ReviewSeen(path, mark, generation))
        self.begin_scan()

    def tick(self, now: float) -> None:
        """Let the core act on deadlines that have passed."""
        deadline = self.sorter.next_deadline()
        if deadline is not None and deadline <= now:
            self.receive(Tick())

    def hint(self, hint: Hint) -> None:
        """Take a watcher's hint: look at what it names."""
        area = self.layout.area_of(hint.path)
        if area is Area.CLASES:
            self.receive(ReferencesTouched())
        elif area is Area.IMAGES:
            if hint.directory:
                self.begin_scan()
            elif not is_temporary(os.path.basename(hint.path)):
                self._look(hint.path, closed=hint.closed)

    def answer(self, answer: Answer) -> None:
        """Take the worker's answer."""
        for event in answer.events:
            if isinstance(event, PrototypesBuilt):
                self._note_rebuilt(event, answer)
            elif isinstance(event, RebuildFailed):
                self._note_rebuild_failed(event)
            elif isinstance(event, Embedded):
                for image in event.images:
                    self._metrics.stage("decode", image.decode_seconds)
                    self._metrics.stage("encode", image.encode_seconds)
            self.receive(event)

    def reload(self, settings: SorterSettings, teaching: Teaching) -> None:
        """Take changed settings over."""
        self.teaching = teaching
        self.sorter.configure(settings, monotonic())

    # ------------------------------------------------------------ scans

    @property
    def is_scanning(self) -> bool:
        """Tell whether a scan is under way."""
        return self._scan is not None

    @property
    def is_drained(self) -> bool:
        """Tell whether nothing is left to do until something else happens."""
        return not (self._scan is not None or self._moves) and self.sorter.is_drained

    def begin_scan(self) -> None:
        """Begin to scan Images/, unless a scan is under way: then another one follows it."""
        if self._scan is not None:
            self._scan_again = True
            return
        self._scan = scan(os.fspath(self.layout.area(Area.IMAGES)), report=self._note_unreadable)
        self.receive(ScanStarted())

    def compare_references(self) -> None:
        """Look whether Clases/ differs from what was last seen of it: a hint may have been lost."""
        found = scan(os.fspath(self.layout.area(Area.CLASES)), report=self._note_unreadable)
        signature = hash(frozenset(found))
        if self._references_signature is not None and self._references_signature != signature:
            self.receive(ReferencesTouched())
        self._references_signature = signature

    def continue_scan(self) -> None:
        """Take the next slice of the scan under way."""
        if self._scan is None:
            return
        taken = list(islice(self._scan, SCAN_SLICE))
        for path, mark in taken:
            self.receive(ImageSeen(path, mark))
        if len(taken) < SCAN_SLICE:
            self._scan = None
            self.receive(ScanFinished())
            if self._scan_again:
                self._scan_again = False
                self.begin_scan()

    def _note_unreadable(self, error: OSError) -> None:
        self.log.warning(SCAN_UNREADABLE, path=error.filename, error=error.strerror, mend="give sortd the right to read it")

    # ------------------------------------------------------------ what goes out

    def _carry_out(self, command: Command) -> None:
        match command:
            case Inspect(path):
                self._look(path, closed=False, inspect=True)
            case Embed(images):
                self._ask(EmbedJob(self.name, images))
            case Rebuild():
                self._rebuild()
            case Scan():
                self.begin_scan()
            case Move():
                self._moves.append(command)
            case Leave(path, refusal, message):
                self._count("left")
                self.log.info(IMAGE_LEFT, path=path, refusal=refusal.value, reason=message)

    def _look(self, path: str, *, closed: bool, inspect: bool = False) -> None:
        mark = stamp(path)
        writer = (writer_of(path) or Writer.UNKNOWN) if inspect and mark is not None else None
        event = ImageGone(path) if mark is None else ImageSeen(path, mark, writer, closed)
        self._commands.extend(self.sorter.receive(event, monotonic()))

    def _rebuild(self) -> None:
        if not self.layout.is_present:
            message = f"{self.layout.marker} is gone: is the disk mounted? `sortd init {self.layout.root}` makes it anew"
            event = RebuildFailed(message, references_absent=True)
            self._note_rebuild_failed(event)
            self._commands.extend(self.sorter.receive(event, monotonic()))
            return
        self._ask(RebuildJob(self.name, self.layout.area(Area.CLASES), self.teaching, self._last_generation))

    def flush(self) -> None:
        """File the moves that were gathered, as one group, and log each."""
        if not self._moves:
            return
        moves, self._moves = self._moves, []
        if not self.layout.is_present:
            for move in moves:
                self.receive(MoveFailed(move.path, move.stamp, MoveFailure.DESTINATION, "the dataset is not mounted"))
            self.receive(RebuildFailed(f"{self.layout.marker} is gone", references_absent=True))
            return
        began = monotonic()
        results = self._mover.move_all(moves)
        milliseconds = 1e3 * (monotonic() - began) / len(moves)
        asked = {(move.path, move.stamp): move for move in moves}
        for result in results:
            self._note_result(asked[result.path, result.stamp], result, milliseconds)
            self.receive(result)

    # ------------------------------------------------------------ what is said

    def _note_result(self, move: Move, result: Moved | MoveFailed, milliseconds: float) -> None:
        if isinstance(result, MoveFailed):
            self.log.warning(MOVE_FAILED, path=result.path, failure=result.failure.value, error=result.message)
            return
        self._count(move.outcome.value)
        self._metrics.stage("settle", move.milliseconds.get("settle", 0.0) / 1e3)
        self._metrics.stage("move", milliseconds / 1e3)
        times = {f"{stage}_ms": value for stage, value in {**move.milliseconds, "move": round(milliseconds, 1)}.items()}
        facts: dict[str, object] = {"path": move.path, "destination": result.destination, **decision_facts(move)}
        level = self.log.warning if move.outcome is Outcome.REJECTED else self.log.info
        level(IMAGE_EVENTS[move.outcome], **facts, **times)

    def _note_rebuilt(self, event: PrototypesBuilt, answer: Answer) -> None:
        rebuilt = answer.rebuilt
        self.problem, self.rebuilt = None, rebuilt
        self._last_generation = max(self._last_generation, event.prototypes.generation)
        self._metrics.generation(self.name, event.prototypes.generation)
        if rebuilt is None:
            return
        for refusal in rebuilt.refused:
            self.log.warning(REFERENCES_UNREADABLE, path=refusal.path, reason=refusal.message)
        if rebuilt.emptied:
            self.log.warning(REFERENCES_EMPTIED, classes=list(rebuilt.emptied), mend="remove the folder, or reload")
        if rebuilt.misnamed:
            self.log.warning(REFERENCES_MISNAMED, folders=list(rebuilt.misnamed), mend="use printable names")
        self.log.info(
            PROTOTYPES_REBUILT,
            generation=event.prototypes.generation,
            changed=rebuilt.changed,
            classes=len(event.prototypes.labels),
            references=int(event.prototypes.counts.sum()),
            encoded_batches=rebuilt.encoded,
            mode=event.prototypes.settings.mode.value,
            encoder_id=event.prototypes.encoder_id,
            milliseconds=round(1e3 * answer.seconds, 1),
        )

    def _note_rebuild_failed(self, event: RebuildFailed) -> None:
        self.problem = event.message
        self.log.error(PROTOTYPES_REBUILD_FAILED, error=event.message, moving=not event.references_absent)

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self._metrics.image(self.name, outcome)


def decision_facts(move: Move) -> dict[str, object]:
    """Return what the log line says of a decision."""
    facts: dict[str, object] = {"generation": move.generation, "encoder_id": move.encoder_id}
    if move.reason:
        facts["reason"] = move.reason
    match move.decision:
        case Assigned(label=label):
            facts["label"] = label
        case Abstained(best_label=label):
            facts["label"] = label
        case None:
            return {"reason": move.reason}
    facts["score"] = round(move.decision.score, 4)
    facts["margin"] = round(move.decision.margin, 4)
    facts["second_label"] = move.decision.second_label
    facts["mode"] = move.decision.mode.value
    return facts
