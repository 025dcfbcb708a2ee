"""The class of an image as keywords in an XMP sidecar beside it (steps K1 to K6 of docs/durability.md), and the undo.

The sidecar is ``a.jpg.xmp`` (darktable, digiKam) or ``a.xmp`` (Adobe), whichever exists; if both or none do, or if
``a.xmp`` belongs to another image as well, ``a.jpg.xmp``. The new content is written under a hidden name and exchanged
with the former file, whose bytes are in the journal before. A file is known by its content.
"""

import hashlib
import os
import stat
from dataclasses import replace

from sortd.companions import companions_of, fold
from sortd.errors import BusyError, ChangedError
from sortd.files import open_descriptor, read_regular, stamp_of, sync_folder
from sortd.moving.copy import (
    Advance,
    copy_metadata,
    copy_owner,
    has_writer,
    hide,
    publish_part,
    remove_part,
    safe_mode,
    sha256_at,
    write_part,
)
from sortd.moving.fs import CANNOT_RENAME, FILE_FLAGS, Folders, check_unchanged, exchange_names, lstat_at
from sortd.moving.plan import NO_STAMP, new_token
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Record, Role
from sortd.xmp import MOST_SIDECAR_BYTES, SidecarError, with_class, without_class

_SIDECAR = 1  # the position of the sidecar in a move


def write_keywords(
    folders: Folders, move: MoveRecord, label: str, advance: Advance, *, filed: MoveRecord | None
) -> MoveRecord:
    """Write the keywords of a class; the journal must contain the move with progress INTENDED (K1).

    With ``filed``, a move that wrote them, take them out again. After any error the caller must recover the move.

    Raises:
        OSError, JournalError: a disk returned an error.
        BusyError: the sidecar is in use, is read-only, is not XMP, or cannot be exchanged.
        ChangedError, VanishedError: the image or the sidecar is another version, or gone.
    """
    folder = folders.open(move.source)
    image, path = move.image, f"{move.source}/{move.image.name}"
    check_unchanged(folder, image.name, image.stamp, path)
    if filed is None:
        name = _sidecar_name(folders, move)
    else:
        name = filed.files[_SIDECAR].name if len(filed.files) > _SIDECAR else ""
    status = lstat_at(folder, name) if name else None
    former = None if status is None else _read(folder, name, move)
    try:
        content = with_class(former, label) if filed is None else _taken_out(filed, label, former)
    except SidecarError as error:
        raise BusyError(f"{move.source}/{name}: {error}") from error
    if content == former or (content is None and filed is None):
        return _ended(folder, move)
    sidecar = MoveFile(
        Role.SIDECAR, name, name, NO_STAMP if status is None else stamp_of(status), _hash(content), content or b""
    )
    files = [image, replace(sidecar, final=name)]
    if former is not None:
        files.append(MoveFile(Role.FORMER, name, name, sidecar.stamp, _hash(former), former))
    changed = replace(move, files=tuple(files), progress=MoveProgress.PUBLISHING)
    if content is not None:
        changed = replace(changed, lost=_write_part(folder, changed))  # K2
    advance(changed)  # K3
    if content is None:
        _remove(folder, changed)
    else:
        _put(folder, changed)
    return _ended(folder, changed)


def recover_keywords(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Complete or reverse a change of a sidecar that did not end; unchanged if its folder is missing.

    Raises OSError.
    """
    try:
        folder = folders.open(move.source)
    except FileNotFoundError:
        return move
    part = move.part_name(_SIDECAR)
    if move.progress is MoveProgress.INTENDED or len(move.files) <= _SIDECAR:
        remove_part(folder, part)
        sync_folder(folder)
        return move.failed("no keyword was written")
    sidecar = move.files[_SIDECAR]
    if not sidecar.body:
        return _recover_removal(folder, move)
    there, hidden = _hash_at(folder, sidecar.name), _hash_at(folder, part)
    if there == sidecar.content and hidden not in {"", sidecar.content} and not _is_former(folder, part, move):
        exchange_names(folder, part, sidecar.name)  # another program wrote it meanwhile: its version goes back
        there, hidden = _hash_at(folder, sidecar.name), _hash_at(folder, part)
    if hidden == sidecar.content and there != hidden:
        remove_part(folder, part)
        hidden = ""
    elif hidden == sidecar.content or _is_former(folder, part, move):
        remove_part(folder, part)
        return _ended(folder, move)
    sync_folder(folder)
    if hidden:
        return move.failed(f"a version of {sidecar.name} is kept as {part}, because another program wrote it meanwhile")
    return _ended(folder, move) if there == sidecar.content else move.failed("no keyword was written")


def plan_keyword_removal(folders: Folders, record: Record) -> tuple[MoveRecord, list[str]] | str:
    """Return the move that takes the keywords of a record out again; or why it is refused. Raises OSError."""
    move = record.move
    status = lstat_at(folders.open(move.source), move.image.name)
    if status is None or not stat.S_ISREG(status.st_mode):
        return "no longer there: moved or removed since"
    image = MoveFile(Role.KEYWORDS, move.image.name, move.image.name, stamp_of(status))
    return MoveRecord(new_token(), move.source, move.destination, (image,)), []


def _sidecar_name(folders: Folders, move: MoveRecord) -> str:
    """Return the name of the sidecar to write: that of an existing one, or the image's name with ``.xmp``."""
    folder, image = folders.open(move.source), move.image.name
    near = [name for name in folders.names(move.source).near(image) if lstat_at(folder, name) is not None]
    own = {one.name: one.shared for one in companions_of(image, near)}
    whole, stem = fold(f"{image}.xmp"), fold(f"{os.path.splitext(image)[0]}.xmp")
    found = [name for wanted in (whole, stem) for name in own if fold(name) == wanted and not own[name]]
    return found[0] if found else f"{image}.xmp"


def _read(folder: int, name: str, move: MoveRecord) -> bytes:
    try:
        content = read_regular(name, limit=MOST_SIDECAR_BYTES, folder=folder)
    except OSError as error:
        raise BusyError(f"{move.source}/{name} cannot be read: {error.strerror or error}") from error
    if not os.access(name, os.W_OK, dir_fd=folder, effective_ids=True):
        raise BusyError(f"{move.source}/{name} is read-only, so sortd does not change it")
    return content


def _taken_out(filed: MoveRecord, label: str, content: bytes | None) -> bytes | None:
    """Return the content of a sidecar without the keywords that a move wrote; None: without the sidecar itself."""
    if content is None or len(filed.files) <= _SIDECAR:
        return content
    sidecar, former = filed.files[_SIDECAR], _former(filed)
    if _hash(content) == sidecar.content:
        return None if former is None else former.body
    kept = without_class(content, label, None if former is None else former.body)
    return content if kept is None else kept


def _former(move: MoveRecord) -> MoveFile | None:
    return next((file for file in move.files if file.role is Role.FORMER), None)


def _hash(content: bytes | None) -> str:
    return hashlib.sha256(content or b"").hexdigest()


def _hash_at(folder: int, name: str) -> str:
    """Return the hash of a file; empty if it does not exist, and the kind of anything that is no regular file."""
    status = lstat_at(folder, name)
    if status is None:
        return ""
    return sha256_at(folder, name) if stat.S_ISREG(status.st_mode) else f"mode {stat.S_IFMT(status.st_mode):o}"


def _is_former(folder: int, name: str, move: MoveRecord) -> bool:
    """Tell whether a hidden file has the bytes that the journal has, and no writer that would change them."""
    former = _former(move)
    if former is None or not former.content:  # damaged: the hash of a missing file is empty, too
        return False
    return _hash_at(folder, name) == former.content and not has_writer(folder, name)


def _write_part(folder: int, move: MoveRecord) -> tuple[str, ...]:
    """Write the new content under a hidden name, with the metadata of the former file, or the image's owner.

    Return the metadata that could not be kept.

    Raises:
        BusyError: owner or permissions are among them: whoever owns the sidecar could not write it any more.
    """
    part, former = move.part_name(_SIDECAR), _former(move)
    remove_part(folder, part)
    write_part(folder, part, move.files[_SIDECAR].body)
    lost: tuple[str, ...] = ()
    original = (former or move.image).name
    with (
        open_descriptor(original, FILE_FLAGS, folder=folder) as like,
        open_descriptor(part, FILE_FLAGS, folder=folder) as copy,
    ):
        status = os.fstat(like)
        if former is None:
            is_same = not copy_owner(copy, status)
            os.fchmod(copy, safe_mode(status.st_mode, () if is_same else ("owner",)) & 0o666)
        else:
            lost = copy_metadata(like, copy, status)
            if not {"owner", "mode"}.isdisjoint(lost):
                said = "its owner and permissions cannot be kept, so sortd does not change it"
                raise BusyError(f"{move.source}/{former.name}: {said}")
            os.utime(copy)
        os.fsync(copy)
    return lost


def _put(folder: int, move: MoveRecord) -> None:
    """Give the new sidecar its name (K4), and remove the former one, if it is the one that was read (K5)."""
    sidecar, part = move.files[_SIDECAR], move.part_name(_SIDECAR)
    if _former(move) is None:
        try:
            publish_part(folder, part, sidecar.name)
        except FileExistsError as error:
            raise ChangedError(f"{move.source}/{sidecar.name}: another program wrote it meanwhile") from error
        return
    try:
        exchange_names(folder, part, sidecar.name)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        said = "its file system cannot exchange two files, so sortd does not change it"
        raise BusyError(f"{move.source}/{sidecar.name}: {said}") from error
    if not _is_former(folder, part, move):
        raise ChangedError(f"{move.source}/{sidecar.name}: another program wrote it meanwhile")
    sync_folder(folder)
    os.unlink(part, dir_fd=folder)


def _remove(folder: int, move: MoveRecord) -> None:
    """Remove a sidecar that sortd made, by way of its tombstone; raise ChangedError if it changed meanwhile."""
    sidecar, tombstone = move.files[_SIDECAR], move.tombstone(_SIDECAR)
    hide(folder, sidecar.name, tombstone)
    if not _is_former(folder, tombstone, move):
        raise ChangedError(f"{move.source}/{sidecar.name}: another program wrote it meanwhile")
    os.unlink(tombstone, dir_fd=folder)


def _recover_removal(folder: int, move: MoveRecord) -> MoveRecord:
    sidecar, tombstone = move.files[_SIDECAR], move.tombstone(_SIDECAR)
    if lstat_at(folder, tombstone) is None:
        gone = lstat_at(folder, sidecar.name) is None
        return _ended(folder, move) if gone else move.failed("the sidecar was not removed")
    if _is_former(folder, tombstone, move):
        os.unlink(tombstone, dir_fd=folder)
        return _ended(folder, move)
    try:
        publish_part(folder, tombstone, sidecar.name)
    except FileExistsError:
        return move.failed(f"a version of {sidecar.name} is kept as {tombstone}, because another file has its name")
    sync_folder(folder)
    return move.failed("the sidecar changed meanwhile")


def _ended(folder: int, move: MoveRecord) -> MoveRecord:
    """Return a move that is done, after a sync of the folder (K6); an undo needs the former bytes, not the new ones."""
    sync_folder(folder)
    status = lstat_at(folder, move.image.name)
    mark = move.image.stamp if status is None else stamp_of(status)
    image = replace(move.image, final=move.image.name, moved_stamp=mark)
    others = (replace(file, body=b"") if file.role is Role.SIDECAR else file for file in move.files[1:])
    return replace(move, files=(image, *others), progress=MoveProgress.DONE)
