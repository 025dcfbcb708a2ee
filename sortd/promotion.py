"""A promotion: the small file in a dataset's state folder that names the fine-tuned model which decides its images.

sortd never writes into the user's configuration, so this file is what ``sortd models promote`` makes and ``demote``
takes away. Without it the prototypes decide. The results of ``sortd finetune`` stand in a folder beside it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortd.errors import DestinationError, ModelError
from sortd.files import read_regular, write_atomic
from sortd.finetuned import FACTS_FILE

PROMOTION_FILE = "classifier.json"
RESULTS_FOLDER = "finetuned"
UNFINISHED = ".unfinished"
"""How the name of a folder ends that a training works in."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """Which model was promoted, when, and how it had done against the prototypes."""

    folder: Path
    model_id: str
    """The identity of what stood in the folder: another model under the same name is not what was promoted."""
    verdict: str
    """``weaker``, ``level`` or ``stronger`` than the prototypes; a weaker one was forced."""
    promoted_at: float
    """Seconds since the epoch."""


def read_promotion(state_folder: Path) -> Promotion | None:
    """Return what was promoted in a dataset, or None.

    Args:
        state_folder: the dataset's own, below the state directory.

    Raises:
        ModelError: the file is there and cannot be read, or is damaged.
    """
    file = state_folder / PROMOTION_FILE
    try:
        facts: dict[str, Any] = json.loads(read_regular(file))
        return Promotion(
            folder=Path(str(facts["folder"])),
            model_id=str(facts["model_id"]),
            verdict=str(facts["verdict"]),
            promoted_at=float(facts["promoted_at"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}; ask as the user that sortd runs as") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{file} is damaged ({error}): promote the model again, or take it back with `sortd models demote`"
        ) from error


def write_promotion(state_folder: Path, promotion: Promotion) -> None:
    """Put a promotion in the place of the last one: a reader, or a crash, sees the one or the other.

    Raises:
        DestinationError: the state folder cannot be written; the last promotion stands.
    """
    file = state_folder / PROMOTION_FILE
    facts = {
        "folder": os.fspath(promotion.folder),
        "model_id": promotion.model_id,
        "verdict": promotion.verdict,
        "promoted_at": round(promotion.promoted_at, 3),
    }
    try:
        state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        write_atomic(file, text.encode("utf-8", "backslashreplace"))  # a lone surrogate is escaped
    except OSError as error:
        raise DestinationError(
            f"{file} cannot be written: {error.strerror}; make room, or promote as the user that sortd runs as"
        ) from error


def remove_promotion(state_folder: Path) -> bool:
    """Take a promotion back; tell whether there was one.

    Raises:
        DestinationError: the file cannot be removed.
    """
    file = state_folder / PROMOTION_FILE
    try:
        file.unlink()
        _sync(state_folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DestinationError(
            f"{file} cannot be removed: {error.strerror}; demote as the user that sortd runs as"
        ) from error
    return True


def results(state_folder: Path) -> list[Path]:
    """List the finished results of ``sortd finetune``, the newest first: their folders' names begin with the time."""
    found = [facts.parent for facts in (state_folder / RESULTS_FOLDER).glob(f"*/{FACTS_FILE}")]
    finished = (folder for folder in found if not folder.name.endswith(UNFINISHED))
    return sorted(finished, key=lambda folder: folder.name, reverse=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
