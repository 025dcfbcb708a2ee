"""The settings of a core: what differs between datasets in how images wait."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SorterSettings:
    """How images wait; what differs between datasets in how they are decided is in the prototypes."""

    settle_seconds: float = 1.0
    batch_size: int = 16
    """Images that are asked for at once: half of what goes through the model, so that the newest never wait long."""
    batches_in_flight: int = 3
    """One that is encoded, one that is decoded meanwhile, and one on its way back."""
    backlog_limit: int = 100_000
    set_rejected_aside: bool = True
    guard_images: int = 200
