"""Effects: what the acts of people did, in words, and which of them can be taken back."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from gettext import NullTranslations
from time import time
from typing import Any

from sortd.commands.console import printable
from sortd.config import Config
from sortd.errors import SortdError
from sortd.layout import Layout
from sortd.review.activity import Activity
from sortd.review.index import Index
from sortd.service import read_status

MOST_ACTS = 1000
"""Acts whose effects are remembered; older ones can be undone from the journal."""
REFUSED_SHOWN = 5


@dataclass(slots=True)
class Act:
    """One form that a person sent, and what came of it."""

    number: int
    dataset: str  # its key
    session: str  # of the person
    kind: str  # assigned, corrected, none, example, undone, retried or audited
    label: str | None = None
    moved: int = 0
    later: int = 0  # images still to be copied to another file system
    ids: list[int] = field(default_factory=list)  # of the moves in the journal
    unknown: frozenset[str] = frozenset()  # images whose moves may have ended later, without an answer
    refused: list[str] = field(default_factory=list)
    right: int = 0  # images of an audit
    judged: int = 0
    generation: int = 0  # the last one of the prototypes before
    at: float = field(default_factory=time)
    is_unanswered: bool = False  # its request failed
    is_tried: bool = False  # to be taken back, whatever came of it
    is_undone: bool = False
    undoes: int = 0  # the number of the act that this one took back; 0: none

    @property
    def can_be_undone(self) -> bool:
        """Whether it moved images, or may have, and was not taken back."""
        return bool(self.ids or self.unknown) and not self.is_undone


class Effects:
    """The acts of the people at this server, newest last; may be used from several threads."""

    def __init__(self, index: Index) -> None:
        """Remember nothing yet."""
        self._index, self._lock = index, threading.Lock()
        self._acts: OrderedDict[int, Act] = OrderedDict()
        self._last = 0

    def add(self, dataset: str, session: str, kind: str, **facts: Any) -> Act:  # noqa: ANN401 - of Act
        """Note an act and return it."""
        with self._lock:
            self._last += 1
            act = self._acts[self._last] = Act(self._last, dataset, session, kind, **facts)
            while len(self._acts) > MOST_ACTS:
                self._acts.popitem(last=False)
            return act

    def get(self, number: int, session: str) -> Act | None:
        """Return an act of a person by its number; nobody sees or takes back those of others by it."""
        with self._lock:
            found = self._acts.get(number)
            return found if found is not None and found.session == session else None

    def newest(self, dataset: str, session: str) -> Act | None:
        """Return the newest act of a person that moved images of a dataset, or may have, and was not undone."""
        with self._lock:
            mine = [one for one in self._acts.values() if (one.dataset, one.session) == (dataset, session)]
            return next((act for act in reversed(mine) if act.can_be_undone and not act.is_tried), None)

    def ids_of_others(self, session: str) -> frozenset[int]:
        """Return the moves of everybody else."""
        with self._lock:
            return frozenset(one for act in self._acts.values() if act.session != session for one in act.ids)

    def line(self, number: int, session: str, translations: NullTranslations) -> dict[str, Any] | None:
        """Return what an act of a person did.

        ``text``, ``tone`` (good, doubt or bad), ``refused``: messages, ``undo``: whether it can be taken back,
        ``consequences``: the number of waiting images that were filed because of it, or None, and ``last``: the newest
        of these moves.
        """
        act = self.get(number, session)
        if act is None:
            return None
        ids = self.consequences(act)
        told = [_done(act, translations)]
        if act.kind in _REFERENCES and act.moved and not act.is_undone:
            told.append(self._effect(act, ids, translations))
        if act.undoes and ids:
            still = translations.ngettext(
                "%(num)d image that sortd filed because of it is still filed.",
                "%(num)d images that sortd filed because of it are still filed.",
                len(ids),
            )
            told.append(still % {"num": len(ids)})
        tone = "bad" if act.refused and not act.moved else "doubt" if act.refused else "good"
        refused = act.refused[:REFUSED_SHOWN]
        if len(act.refused) > len(refused):
            hidden = len(act.refused) - len(refused)
            refused.append(translations.ngettext("%(num)d more", "%(num)d more", hidden) % {"num": hidden})
        return {
            "number": number,
            "text": " ".join(text for text in told if text),
            "tone": tone,
            "refused": refused,
            "undo": act.can_be_undone and bool(act.ids or act.later),
            "consequences": len(ids) if ids else None,
            "last": max(ids, default=0),
        }

    def consequences(self, act: Act) -> list[int]:
        """Return the moves by which sortd filed waiting images because of an act, or of the one that it took back.

        Those are the moves by the prototypes that had the references of the act, until a later act changed them again.
        """
        cause = self.get(act.undoes, act.session) if act.undoes else act
        if cause is None or cause.kind not in _REFERENCES or not cause.moved:
            return []
        with self._lock:
            same = [one for one in self._acts.values() if one.dataset == cause.dataset and one.moved]
        later = [one.generation for one in same if one.kind in _CHANGES and one.generation > cause.generation]
        last = min(later, default=_LAST_GENERATION)
        layout = self._index.dataset(cause.dataset)
        return Activity(self._index.config.state_dir, layout).filed_because(cause.at, cause.generation, last)

    def _effect(self, act: Act, filed: Sequence[int], translations: NullTranslations) -> str:
        answers = translations.ngettext("Your %(num)d answer", "Your %(num)d answers", act.moved) % {"num": act.moved}
        if filed:
            made = translations.ngettext(
                "%(answers)s made %(num)d waiting image sure: it was filed.",
                "%(answers)s made %(num)d waiting images sure: they were filed.",
                len(filed),
            )
            return made % {"answers": answers, "num": len(filed)}
        layout = self._index.dataset(act.dataset)
        now = running_state(self._index.config, layout)
        if now is None:
            return translations.gettext("sortd does not run: it will use them when it runs again.")
        if now.problem:
            return translations.gettext("sortd has a problem: %(problem)s") % {"problem": printable(now.problem)}
        if now.is_rebuilding or now.written_at <= act.at:
            return translations.gettext("sortd rebuilds its prototypes with them …")
        if not self._index.waiting(layout):
            return ""
        return translations.gettext("%(answers)s made no other waiting image sure yet.") % {"answers": answers}


_REFERENCES = frozenset({"assigned", "corrected", "example"})
"""The kinds of acts by which sortd gets references."""
_CHANGES = _REFERENCES | {"undone"}
_LAST_GENERATION = 2**63 - 1


def _done(act: Act, translations: NullTranslations) -> str:
    """Return what an act moved, in words."""

    def ngettext(one: str, several: str, num: int = act.moved, **values: object) -> str:
        return translations.ngettext(one, several, num) % {"num": num, **values}

    match act.kind:
        case _ if act.is_undone:
            text = ngettext("Taken back: %(num)d image.", "Taken back: %(num)d images.")
        case "undone" if not act.moved and not act.refused:
            text = translations.gettext("There is nothing to undo.")
        case _ if not act.moved and act.kind != "audited":
            text = translations.gettext("Nothing was moved.")
        case "assigned" | "corrected":
            label = printable(act.label or "")
            text = ngettext("%(num)d image filed into %(label)s.", "%(num)d images filed into %(label)s.", label=label)
        case "none" | "example":
            text = ngettext(
                "%(num)d image set apart as none of the classes.", "%(num)d images set apart as none of the classes."
            )
        case "undone":
            text = ngettext("%(num)d image is back.", "%(num)d images are back.")
        case "retried":
            text = ngettext("%(num)d image is tried again.", "%(num)d images are tried again.")
        case _:
            text = ngettext(
                "%(right)d of %(num)d image of the sample is right.",
                "%(right)d of %(num)d images of the sample are right.",
                act.judged,
                right=act.right,
            )
            text *= bool(act.judged)
    if not act.later:
        return text
    copied = ngettext(
        "%(num)d image is still being copied to another disk.",
        "%(num)d images are still being copied to another disk.",
        act.later,
    )
    return f"{text} {copied}"


@dataclass(frozen=True, slots=True)
class RunningState:
    """What the running sortd says of a dataset in its status."""

    problem: str  # why nothing is moved or the last rebuild failed; "": it works
    is_rebuilding: bool
    written_at: float


def running_state(config: Config, layout: Layout) -> RunningState | None:
    """Return what the running sortd says of a dataset; None if none runs, or if it has not come to it yet."""
    try:
        status = read_status(config.state_dir)
    except SortdError:
        return None
    found = None if status is None or not status["alive"] else status.get("datasets", {}).get(layout.name)
    if status is None or not isinstance(found, dict):
        return None
    return RunningState(found.get("problem") or "", bool(found.get("rebuilding")), float(status.get("written_at", 0.0)))
