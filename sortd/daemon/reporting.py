"""What the daemon reports of a dataset: log lines, counters, and the entry in the status."""

import time
from collections import Counter
from itertools import islice
from pathlib import Path

import structlog

from sortd import errors, logs
from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet
from sortd.core.sorter import Sorter
from sortd.core.state import State
from sortd.daemon.corrections import Correction
from sortd.daemon.metrics import Metrics
from sortd.daemon.references import Rebuilt
from sortd.events import (
    Abstained,
    Assigned,
    ClassifierKind,
    Embedded,
    Leave,
    Mode,
    Move,
    Moved,
    MoveFailed,
    MoveFailure,
    Outcome,
    RebuildFailed,
)
from sortd.layout import Why
from sortd.store.records import MoveRecord, Record


def log_availability(problem: str | None, metrics: Metrics) -> None:
    """Log that the encoder of another process went away, or (None) is back, and set its metric."""
    metrics.set("sortd_encoder_away", int(problem is not None))
    log = structlog.get_logger()
    if problem is None:
        log.info(logs.ENCODER_BACK)
    else:
        log.warning(logs.ENCODER_AWAY, error=problem, advice="start it; images wait until it is back")


Decisions = Counter[tuple[Outcome, str]]
"""Numbers of moves by outcome, and by the class of filed images and the reason of those in Review/."""

REMEMBERED = 100_000  # paths that were logged; beyond, they are logged again
LISTED = 1_000  # files in the status, at most


class DatasetLog:
    """Logs and counts what happened, each once."""

    def __init__(self, dataset: str, metrics: Metrics) -> None:
        """Start with empty counters."""
        self.outcomes: dict[str, int] = {}
        self.decisions: Decisions = Counter()
        self.problem: str | None = None  # why nothing is moved or the last rebuild failed, in a sentence
        self.classifier: dict[str, object] = {"deciding": ClassifierKind.PROTOTYPES.value, "model_id": None}
        self._dataset, self._metrics = dataset, metrics
        self._is_review_full = False
        self._logged: set[int] = set()
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger().bind(dataset=dataset)

    def moved(self, move: Move, result: Moved | MoveFailed, milliseconds: float) -> None:
        """Log the outcome of an image; ``milliseconds`` is its share of the group of moves."""
        if isinstance(result, MoveFailed):
            if result.failure is MoveFailure.VANISHED:
                self._log.info(logs.IMAGE_VANISHED, path=result.path)
                return
            self._log.warning(logs.MOVE_FAILED, path=result.path, failure=result.failure.value, error=result.message)
            return
        self._count(move.outcome.value)
        self._metrics.stage("settle", move.milliseconds.get("settle", 0.0) / 1e3)
        self._metrics.stage("move", milliseconds / 1e3)
        times = {f"{stage}_ms": value for stage, value in {**move.milliseconds, "move": round(milliseconds, 1)}.items()}
        decided = decision_facts(move)
        key = {Outcome.FILED: "label", Outcome.REVIEW: "reason"}.get(move.outcome, "")
        self.decisions[move.outcome, str(decided.get(key) or "")] += 1
        facts: dict[str, object] = {"path": move.path, "destination": result.destination, **decided}
        if move.action != "move":
            facts["action"] = move.action
        if result.note:
            facts["note"] = result.note
        level = self._log.warning if move.outcome is Outcome.REJECTED or result.note else self._log.info
        level(logs.IMAGE_EVENTS[move.outcome], **facts, **times)

    def recovered(self, record: Record, root: Path) -> None:
        """Log the outcome of an image whose move had been interrupted, with the facts of an ordinary move."""
        reason = record.move_reason
        self._count(reason.outcome)
        names = ("outcome", "label", "reason", "second_label", "mode", "generation", "encoder_id")
        facts: dict[str, object] = {name: getattr(reason, name) or None for name in names}
        facts |= {
            name: None if (value := getattr(reason, name)) is None else round(value, 4) for name in ("score", "margin")
        }
        facts["note"] = record.move.message or None
        self._log.warning(
            logs.MOVE_RECOVERED,
            path=str(root / record.source_path),
            destination=str(root / record.destination_path),
            **{name: fact for name, fact in facts.items() if fact is not None},
        )

    def taken_back(self, move: MoveRecord, root: Path) -> None:
        """Log that an interrupted move was reverted, but its image is not in its old place."""
        path = str(root / move.source / move.image.name)
        self._log.warning(logs.MOVE_FAILED, path=path, failure="recovery", error=move.message)

    def left(self, leave: Leave) -> None:
        """Log that a file stays where it is."""
        self._count("left")
        self._log.info(logs.IMAGE_LEFT, path=leave.path, refusal=leave.refusal.value, reason=leave.message)

    def stays(self, path: str, why: Why) -> None:
        """Log that a file in the inbox is not processed, once for each path and reason."""
        if self.has_logged(path, why):
            return
        if len(self._logged) >= REMEMBERED:
            self._logged.clear()
        self._logged.add(hash((path, why.reason)))
        self._log.info(logs.IMAGE_LEFT, path=path, refusal=why.reason.value, reason=why.message)

    def has_logged(self, path: str, why: Why) -> bool:
        """Return whether this reason was logged for this path."""
        return hash((path, why.reason)) in self._logged

    def corrected(self, correction: Correction) -> None:
        """Log that the user moved an image to another class, or to the class that was the best guess; not if back."""
        if correction.is_taken_back:
            return
        if correction.is_confirmation:
            self._log.info(logs.IMAGE_CONFIRMED, path=correction.path, label=correction.label)
            return
        self._metrics.count("sortd_corrections", self._dataset)
        self._log.info(
            logs.IMAGE_CORRECTED, path=correction.path, label=correction.label, corrected_label=correction.corrected
        )

    def embedded(self, event: Embedded) -> None:
        """Count the durations of a batch."""
        for image in event.images:
            self._metrics.stage("decode", image.decode_seconds)
            self._metrics.stage("encode", image.encode_seconds)

    def unreadable(self, error: OSError) -> None:
        """Log what a scan could not read."""
        self._log.warning(
            logs.SCAN_UNREADABLE, path=error.filename, error=error.strerror, advice=errors.advice_for(error)
        )

    def rebuilt(self, prototypes: PrototypeSet, rebuilt: Rebuilt, seconds: float) -> None:
        """Log what the new prototypes were built from, and what is wrong with the references."""
        self.problem = None
        self._metrics.set("sortd_prototypes_generation", prototypes.generation, self._dataset)
        self._metrics.set("sortd_prototypes_built_timestamp_seconds", time.time(), self._dataset)
        for refusal in rebuilt.refused:
            self._log.warning(logs.REFERENCES_UNREADABLE, path=refusal.path, reason=refusal.message)
        if rebuilt.emptied:
            self._log.warning(
                logs.REFERENCES_EMPTIED, classes=list(rebuilt.emptied), advice="remove the folder, or reload"
            )
        if rebuilt.misnamed:
            self._log.warning(logs.REFERENCES_MISNAMED, folders=list(rebuilt.misnamed), advice="use printable names")
        calibration = prototypes.calibration
        checked = {"checked": calibration.checked, "right_checked": calibration.right_checked}
        self._log.info(
            logs.PROTOTYPES_REBUILT,
            generation=prototypes.generation,
            changed=rebuilt.changed,
            classes=len(prototypes.labels),
            references=int(prototypes.counts.sum()),
            encoded_batches=rebuilt.encoded,
            mode=prototypes.settings.mode.value,
            encoder_id=prototypes.encoder_id,
            least_confidence=round(calibration.confidence, 4),
            **(checked if calibration.checked else {}),
            milliseconds=round(1e3 * seconds, 1),
        )

    def decided_by(self, finetuned: FinetunedClassifier | None, refusal: str | None) -> None:
        """Log a change of the classifier (None: prototypes), and why the wanted model is not used."""
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
                "filed_held_out": calibration.filed_held_out,
                "right_held_out": calibration.right_held_out,
                "precision_expected": calibration.precision_expected,
                "filed_expected": calibration.filed_expected,
                "notes": list(calibration.notes),
            }
        self._log.info(logs.CLASSIFIER_CHANGED, **facts)

    def held(self, reason: str, root: Path) -> None:
        """Log that nothing is moved until the operator releases the dataset."""
        advice = f"check `sortd eval`, then `sortd release {root}`, or `sortd release --all` for held files too"
        self._log.error(logs.DATASET_HELD, reason=reason, advice=advice)

    def review_full(self, *, is_full: bool, is_all: bool = False) -> None:
        """Log once that not all images of Review/ fit; ``is_all`` marks the end of a scan."""
        if is_full and not self._is_review_full:
            self._log.warning(logs.BACKLOG_FULL, area="Review", advice="sort them by hand, or raise backlog_limit")
        self._is_review_full = is_full or (self._is_review_full and not is_all)

    def scanned(self) -> None:
        """Log the end of a scan of Images/."""
        self._log.debug(logs.SCAN_FINISHED)

    def rebuild_failed(self, event: RebuildFailed) -> None:
        """Log why the last prototypes stay in use, each reason once."""
        if self.problem != event.message:
            self._log.error(logs.PROTOTYPES_REBUILD_FAILED, error=event.message, moving=not event.references_absent)
        self.problem = event.message

    def facts(self, sorter: Sorter, *, generation: int, mode: Mode) -> dict[str, object]:
        """Return the entry of the dataset in ``sortd status``; ``generation`` is the last one used."""
        prototypes = None if sorter.built is None else sorter.built.prototypes
        return {
            "problem": sorter.guard.reason or self.problem,
            "moving": sorter.may_move,
            "rebuilding": sorter.rebuilds.is_pending,
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
    """Return the files of the inbox that stay where they are, and their number by reason."""
    resting = [*sorter.images.in_state(State.REFUSED), *sorter.images.in_state(State.REVIEWED)]
    refused = [entry for entry in resting if not entry.is_put_away]
    files = [
        {"path": entry.path, "reason": str(entry.refusal), "message": entry.message}
        for entry in islice(refused, LISTED)
    ]
    return {"reasons": dict(Counter(str(entry.refusal) for entry in refused)), "files": files}


def decision_facts(move: Move) -> dict[str, object]:
    """Return the fields of the log line for a decision."""
    decision = move.decision
    if decision is None:
        named = {} if move.assigned_label is None else {"label": move.assigned_label}
        return {**named, "reason": move.reason}
    return {
        **({"label": decision.label} if isinstance(decision, Assigned) else {}),
        **({"label": decision.best_label, "reason": move.reason} if isinstance(decision, Abstained) else {}),
        "score": round(decision.score, 4),
        "margin": round(decision.margin, 4),
        "second_label": decision.second_label,
        "mode": decision.mode.value,
        "generation": move.generation,
        "encoder_id": move.encoder_id,
    }
