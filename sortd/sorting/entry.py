"""An entry of the backlog: one image, its known version and state, and the times that its log line will want.

Which states follow which is the backlog's to say, see ``backlog.py``.
"""

from dataclasses import dataclass
from enum import StrEnum

from sortd.messages import Refusal, Stamp


class State(StrEnum):
    """What an image waits for."""

    SETTLING = "settling"
    READY = "ready"
    ENCODING = "encoding"
    EMBEDDED = "embedded"
    MOVING = "moving"
    ABSTAINED = "abstained"
    REFUSED = "refused"
    HELD = "held"


RESTING = frozenset({State.ABSTAINED, State.REFUSED, State.HELD})
"""States that an image leaves only when something else happens: they are no work."""

ON_THE_WAY = frozenset({State.READY, State.ENCODING, State.MOVING})
"""States of an image that is about to be moved, if nothing comes in between."""


@dataclass(slots=True)
class Entry:
    """One image: its known version, its state, and the times that its log line will want."""

    path: str
    stamp: Stamp
    state: State
    first_seen: float
    still_since: float
    ready_at: float = 0.0
    recheck_at: float = 0.0
    closed: bool = False
    busy: bool = False
    is_unfinished: bool = False  # a file beside it said so when it was last asked for
    heap_at: float | None = None
    ticket: int = 0
    generation: int = 0
    in_review: bool = False
    is_aside: bool = False  # it stands in Rejected/ already
    refusal: Refusal | None = None  # why it stays where it is
    told: str = ""  # why this version was refused: said once
    folder: str = ""  # where it was last to be moved
    place: str = ""  # the folder, of those that it is moved from and to, that refused and that it waits for
    is_held: bool = False  # it was held while it moved
    failures: int = 0
    setbacks: int = 0  # how often this version settled and could not be taken
    scan: int = 0

    @property
    def settle_seconds(self) -> float:
        """How long the image took from its first sight to standing still, in seconds."""
        return max(0.0, self.ready_at - self.first_seen)
