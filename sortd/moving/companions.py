"""Which files belong to an image by their names: sidecars, the film of a Live Photo, the raw of a RAW+JPEG pair; pure.

Both habits of naming a sidecar are known: ``a.xmp`` (darktable's import, Lightroom) and ``a.jpg.xmp`` (darktable,
digiKam, Google Takeout). A sidecar named by the stem may belong to two images; see osxphotos issue 210.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sortd.moving.free_names import split_name

SIDECARS = (".xmp", ".json", ".aae", ".thm")
TAKEOUT = ".supplemental-metadata.json"
FILMS = (".mov", ".mp4")
RAWS = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".kdc", ".mrw", ".nef", ".nrw"),
    *(".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif", ".avif")


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that goes where its image goes."""

    name: str
    shared: bool  # another image that stays needs it too: it is copied


def companions_of(image: str, stands: Callable[[str], bool]) -> tuple[Companion, ...]:
    """Return what belongs to an image.

    A film or a raw that a second image shares stays until the last of these images leaves: it is no note about an
    image but one itself, and is not doubled.

    Args:
        image: base name of the image.
        stands: tells whether a regular file of that name stands beside it.
    """
    stem, _ = split_name(image)
    pairs = tuple(name for name in _with_suffixes(stem, FILMS + RAWS) if name != image and stands(name))
    notes = tuple(name for name in _with_suffixes(stem, SIDECARS) if name != image and stands(name))
    owned = tuple(name for name in _notes_on(image) if stands(name))
    if not pairs and not notes:
        return tuple(Companion(name, shared=False) for name in owned)
    rivals = any(stands(name) for name in _with_suffixes(stem, IMAGES) if name != image)
    travelling = () if rivals else pairs
    owned += tuple(name for pair in travelling for name in _notes_on(pair) if stands(name))
    return (
        *(Companion(name, shared=False) for name in travelling + owned),
        *(Companion(name, shared=rivals) for name in notes),
    )


def images_with(name: str) -> tuple[str, ...]:
    """Return the names of images to which a file of this name may belong; none for a file that is no companion.

    Args:
        name: base name of a sidecar, a film or a raw.
    """
    owner = _owner_of(name)
    if owner is None:
        return ()
    stem, suffix = split_name(owner)
    named = (owner,) if owner != name and suffix.lower() in IMAGES else ()
    stems = (stem,) if owner == name or suffix.lower() in FILMS + RAWS else (owner,)
    candidates = (*named, *(image for one in stems for image in _with_suffixes(one, IMAGES)))
    return tuple(dict.fromkeys(image for image in candidates if image != name))


def _owner_of(name: str) -> str | None:
    """Return what a note is about, or a film or raw itself."""
    for ending in (TAKEOUT, *SIDECARS):
        for spelled in (ending, ending.upper()):
            if name.endswith(spelled) and len(name) > len(spelled):
                return name.removesuffix(spelled)
    return name if split_name(name)[1] in {*_with_suffixes("", FILMS + RAWS)} else None


def _notes_on(name: str) -> Iterator[str]:
    return _with_suffixes(name, (*SIDECARS, TAKEOUT))


def _with_suffixes(stem: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for suffix in suffixes:
        yield stem + suffix
        yield stem + suffix.upper()
