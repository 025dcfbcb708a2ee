"""The log lines and the counts of one dataset, and what ``sortd status`` shows of it."""

from collections import Counter
from itertools import islice
from pathlib import Path

import structlog

from sortd import errors, logs
from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet
from sortd.classify.types import Abstained, Assigned, ClassifierKind, Mode
from sortd.core.sorter import Sorter
from sortd.core.state import State
from sortd.daemon.corrections import Correction
from sortd.daemon.references import Rebuilt
from sortd.events import Embedded, Leave, Move, Moved, MoveFailed, MoveFailure, Outcome, RebuildFailed
from sortd.metrics import Metrics
from sortd.names import Why
from sortd.store.records import MoveRecord, Record

REMEMBERED = 100_000  # paths that were told of; beyond, they are told of again

LISTED = 1_000  # files that the status lists; of all of them the reasons are counted


class DatasetLog:
    """Says what happened, once each, and counts it."""

    def __init__(self, dataset: str, metrics: Metrics) -> None:
        """Begin with nothing counted."""
        self.outcomes: dict[str, int] = {}
        self.problem: str | None = None
        """Why nothing moves or nothing new was learnt, in a sentence; None while all is well."""
        self.classifier: dict[str, object] = {"deciding": ClassifierKind.PROTOTYPES.value, "model_id": None}
        """What decides, and as ``refusal`` why a fine-tuned model that is wanted does not."""
        self._dataset, self._metrics = dataset, metrics
        self._is_review_full = False
        self._told_of: set[int] = set()
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger().bind(dataset=dataset)

    def moved(self, move: Move, result: Moved | MoveFailed, milliseconds: float) -> None:
        """Write the canonical line of an image's outcome; ``milliseconds`` is its share of its group's move."""
        if isinstance(result, MoveFailed):
            if result.failure is MoveFailure.VANISHED:
                # Whoever takes a file away while it is decided upon has done nothing wrong.
                self._log.info(logs.IMAGE_VANISHED, path=result.path)
                return
            self._log.warning(logs.MOVE_FAILED, path=result.path, failure=result.failure.value, error=result.message)
            return
        self._count(move.outcome.value)
        self._metrics.stage("settle", move.milliseconds.get("settle", 0.0) / 1e3)
        self._metrics.stage("move", milliseconds / 1e3)
        times = {f"{stage}_ms": value for stage, value in {**move.milliseconds, "move": round(milliseconds, 1)}.items()}
        facts: dict[str, object] = {"path": move.path, "destination": result.destination, **decision_facts(move)}
        if result.note:  # two copies, say, where one could not be removed: somebody should know
            facts["note"] = result.note
        level = self._log.warning if move.outcome is Outcome.REJECTED or result.note else self._log.info
        level(logs.IMAGE_EVENTS[move.outcome], **facts, **times)

    def recovered(self, record: Record, root: Path) -> None:
        """Write the line of an image whose move had been cut short; it says what the line of the move would have."""
        grounds = record.grounds
        self._count(grounds.outcome)
        names = ("outcome", "label", "reason", "second_label", "mode", "generation", "encoder_id")
        facts: dict[str, object] = {name: getattr(grounds, name) or None for name in names}
        facts["score"] = None if grounds.score is None else round(grounds.score, 4)
        facts["margin"] = None if grounds.margin is None else round(grounds.margin, 4)
        facts["note"] = record.relocation.message or None
        self._log.warning(
            logs.MOVE_RECOVERED,
            path=str(root / record.source_path),
            destination=str(root / record.destination_path),
            **{name: fact for name, fact in facts.items() if fact is not None},
        )

    def taken_back(self, relocation: MoveRecord, root: Path) -> None:
        """Say that a move which had been cut short was taken back, and yet its image is not where it was."""
        path = str(root / relocation.source / relocation.image.name)
        self._log.warning(logs.MOVE_FAILED, path=path, failure="recovery", error=relocation.message)

    def left(self, leave: Leave) -> None:
        """Say that a file stays where it is."""
        self._count("left")
        self._log.info(logs.IMAGE_LEFT, path=leave.path, refusal=leave.refusal.value, reason=leave.message)

    def stays(self, path: str, why: Why) -> None:
        """Say that something in the inbox is not looked at; once for each path and reason."""
        if self.has_told(path, why):
            return
        if len(self._told_of) >= REMEMBERED:
            self._told_of.clear()
        self._told_of.add(hash((path, why.reason)))
        self._log.info(logs.IMAGE_LEFT, path=path, refusal=why.reason.value, reason=why.message)

    def has_told(self, path: str, why: Why) -> bool:
        """Tell whether this was said of a path before."""
        return hash((path, why.reason)) in self._told_of

    def corrected(self, correction: Correction) -> None:
        """Say that the user moved an image to another class than sortd had decided."""
        self._metrics.correction(self._dataset)
        self._log.info(
            logs.IMAGE_CORRECTED, path=correction.path, label=correction.label, corrected_label=correction.corrected
        )

    def embedded(self, event: Embedded) -> None:
        """Count the times of a batch."""
        for image in event.images:
            self._metrics.stage("decode", image.decode_seconds)
            self._metrics.stage("encode", image.encode_seconds)

    def unreadable(self, error: OSError) -> None:
        """Say that a scan could not look at something."""
        self._log.warning(
            logs.SCAN_UNREADABLE, path=error.filename, error=error.strerror, mend=errors.advice_for(error)
        )

    def rebuilt(self, prototypes: PrototypeSet, rebuilt: Rebuilt, seconds: float) -> None:
        """Say what the new prototypes were built from and what was wrong with the references."""
        self.problem = None
        self._metrics.generation(self._dataset, prototypes.generation)
        for refusal in rebuilt.refused:
            self._log.warning(logs.REFERENCES_UNREADABLE, path=refusal.path, reason=refusal.message)
        if rebuilt.emptied:
            self._log.warning(
                logs.REFERENCES_EMPTIED, classes=list(rebuilt.emptied), mend="remove the folder, or reload"
            )
        if rebuilt.misnamed:
            self._log.warning(logs.REFERENCES_MISNAMED, folders=list(rebuilt.misnamed), mend="use printable names")
        self._log.info(
            logs.PROTOTYPES_REBUILT,
            generation=prototypes.generation,
            changed=rebuilt.changed,
            classes=len(prototypes.labels),
            references=int(prototypes.counts.sum()),
            encoded_batches=rebuilt.encoded,
            mode=prototypes.settings.mode.value,
            encoder_id=prototypes.encoder_id,
            milliseconds=round(1e3 * seconds, 1),
        )

    def decided_by(self, finetuned: FinetunedClassifier | None, refusal: str | None) -> None:
        """Say once what decides from now on (None: the prototypes), and why a model that is wanted does not."""
        before = self.classifier
        kind = ClassifierKind.PROTOTYPES if finetuned is None else ClassifierKind.FINETUNED
        model_id = None if finetuned is None else finetuned.encoder_id
        self.classifier = {"deciding": kind.value, "model_id": model_id, "refusal": refusal}
        if refusal is not None and refusal != before.get("refusal"):
            self._log.error(logs.CLASSIFIER_REFUSED, error=refusal, classifier=kind.value)
        if model_id == before["model_id"]:
            return
        facts: dict[str, object] = {"classifier": kind.value, "model_id": model_id}
        if finetuned is not None:
            calibration = finetuned.calibration
            facts |= {
                "generation": finetuned.generation,
                "classes": len(finetuned.labels),
                "least_confidence": round(calibration.confidence, 4),
                "held_out": calibration.held_out,
                "precision_expected": calibration.precision_expected,
                "filed_expected": calibration.filed_expected,
                "notes": list(calibration.notes),
            }
        self._log.info(logs.CLASSIFIER_CHANGED, **facts)

    def held(self, reason: str, root: Path) -> None:
        """Say that nothing moves until somebody has looked."""
        mend = f"look at `sortd eval`, then `sortd release {root}`, or `sortd release --all` for held files too"
        self._log.error(logs.DATASET_HELD, reason=reason, mend=mend)

    def review_full(self, *, is_full: bool, is_all: bool = False) -> None:
        """Say, once, that there is no room to remember all images of Review/; with ``is_all`` it was looked through."""
        if is_full and not self._is_review_full:
            self._log.warning(logs.BACKLOG_FULL, area="Review", mend="sort them by hand, or raise backlog_limit")
        self._is_review_full = is_full or (self._is_review_full and not is_all)

    def scanned(self) -> None:
        """Log that a scan of Images/ has ended."""
        self._log.debug(logs.SCAN_FINISHED)

    def rebuild_failed(self, event: RebuildFailed) -> None:
        """Say why the last good prototypes stay; the same reason once."""
        if self.problem != event.message:
            self._log.error(logs.PROTOTYPES_REBUILD_FAILED, error=event.message, moving=not event.references_absent)
        self.problem = event.message

    def facts(self, sorter: Sorter, *, generation: int, mode: Mode) -> dict[str, object]:
        """Return what ``sortd status`` shows of the dataset, as plain values; ``generation`` is the last one used."""
        prototypes = sorter.prototypes
        return {
            "problem": sorter.guard.reason or self.problem,
            "moving": sorter.may_move,
            "images": {state.value: count for state, count in sorter.images.counts.items()},
            "outcomes": dict(self.outcomes),
            "generation": generation,
            "classes": [] if prototypes is None else list(prototypes.labels),
            "references": 0 if prototypes is None else int(prototypes.counts.sum()),
            "mode": mode.value,
            "classifier": self.classifier,
            "left": _left(sorter),
        }

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self._metrics.image(self._dataset, outcome)


def _left(sorter: Sorter) -> dict[str, object]:
    """Count the files of the inbox that were looked at and stay where they are by reason, and list them."""
    refused = [entry for entry in sorter.images.in_state(State.REFUSED) if not (entry.is_aside or entry.in_review)]
    files = [
        {"path": entry.path, "reason": str(entry.refusal), "message": entry.told} for entry in islice(refused, LISTED)
    ]
    return {"reasons": dict(Counter(str(entry.refusal) for entry in refused)), "files": files}


def decision_facts(move: Move) -> dict[str, object]:
    """Return what the log line says of a decision."""
    facts: dict[str, object] = {}
    match move.decision:
        case Assigned(label=label):
            facts["label"] = label
        case Abstained(best_label=label):
            facts |= {"label": label, "reason": move.reason}
        case None:
            return {"reason": move.reason}
    decision = move.decision
    return facts | {
        "score": round(decision.score, 4),
        "margin": round(decision.margin, 4),
        "second_label": decision.second_label,
        "mode": decision.mode.value,
        "generation": move.generation,
        "encoder_id": move.encoder_id,
    }
