"""The table of companions: files that belong to an image by name, such as sidecars, films, raws and voice notes.

A program names a sidecar by the stem of its image (``a.xmp``) or by the whole name (``a.jpg.xmp``). One named by the
stem may belong to two images (osxphotos issue 210). Subfolders (``CaptureOne/``, ``NKSC_PARAM/``) and catalogues
(``.lrcat``, Luminar) are not supported.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto
from functools import lru_cache

LONGEST_SUFFIX = 20  # bytes; a longer suffix counts as part of the stem

IMAGES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
        *(".heic", ".heif", ".hif", ".avif"),
    }
)
"""Suffixes of images, in lower case."""
RAWS = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".kdc", ".mef", ".mos"),
    *(".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
FILMS = (".mov", ".mp4", ".m4v", ".avi", ".3gp", ".mpg", ".mp", ".mv")

_SUPPLEMENTAL = "supplemental-metadata"
_CUT = 46  # the length to which Google Takeout cuts a sidecar's name, before (1) and .json

_EDITED = "edited|effects|smile|mix|bearbeitet|modifié|modificato|edytowane|bewerkt|編集済み|ha editado|editado|editat"
_STEM, _SUFFIX, _NUMBER = r"(?P<stem>.+)", r"(?P<suffix>\.[^.]{1,20}?)", r"(?P<number>\(\d+\))"
_TITLE = rf"(?P<stem>.+?){_SUFFIX}"
_SUPPLEMENT = "(?:" + "|".join(_SUPPLEMENTAL[:length] for length in range(len(_SUPPLEMENTAL), -1, -1)) + ")"
_RAW = "(?:" + "|".join(suffix[1:] for suffix in RAWS) + ")"


class Kind(Flag):
    """The relation of a companion to its image."""

    NOTE = 0
    PAIR = auto()  # a film or a raw: a part of the image instead of a note about it
    GUESS = auto()  # applies only if no other naming gives the file to another image


PAIR, GUESS = Kind.PAIR, Kind.GUESS


@dataclass(frozen=True, slots=True)
class Naming:
    """A program's rule for the names of companions."""

    program: str
    pattern: str  # matches the whole name, ignoring case; ``stem``, ``suffix`` and ``number`` are the image's
    example: tuple[str, str]  # image, companion
    source: str
    kind: Kind = Kind.NOTE
    stem: str = r"\g<stem>"  # the image's stem, as a template for the match
    image: str = ""  # pattern of the only images that it applies to, which then count as having another name
    counts_as: str = ""


NAMINGS = (  # GPTH: GooglePhotosTakeoutHelper
    Naming("Lightroom, Camera Raw", rf"{_STEM}\.(?:xmp|acr)", ("a.jpg", "a.xmp"), "Adobe: XMP and .acr sidecars"),
    Naming("darktable", rf"{_STEM}{_SUFFIX}\.xmp", ("a.jpg", "a.jpg.xmp"), "darktable manual, sidecar files"),
    Naming("darktable", rf"{_STEM}_\d\d{_SUFFIX}\.xmp", ("a.jpg", "a_01.jpg.xmp"), "the same, duplicates", GUESS),
    Naming("digiKam", rf"{_STEM}{_SUFFIX}\.xmp", ("a.tif", "a.tif.xmp"), "KDE bugs 264007 and 278935, digiKam PR 6"),
    Naming("RawTherapee", rf"{_STEM}{_SUFFIX}\.pp3", ("a.jpg", "a.jpg.pp3"), "rawtherapee(1), -s"),
    Naming("RawTherapee", rf"{_STEM}{_SUFFIX}\.out\.pp3", ("a.jpg", "a.jpg.out.pp3"), "RawPedia, sidecar files"),
    Naming("RawTherapee", rf"{_STEM}\.pp3", ("a.jpg", "a.pp3"), "rawtherapee(1), -p: a profile saved beside the image"),
    Naming("ART", rf"{_STEM}{_SUFFIX}\.arp", ("a.tif", "a.tif.arp"), "ART manual, sidecar files"),
    Naming("DxO PhotoLab", rf"{_STEM}{_SUFFIX}\.dop", ("a.jpg", "a.jpg.dop"), "DxO PhotoLab user guide, sidecar files"),
    Naming("ON1 Photo RAW", rf"{_STEM}\.on1", ("a.jpg", "a.on1"), "ON1 Photo RAW user guide, sidecar files"),
    Naming("Capture One", rf"{_STEM}{_SUFFIX}\.co[spf]", ("a.jpg", "a.jpg.cos"), "Capture One, sessions: settings"),
    Naming("Nikon NX Studio", rf"{_STEM}{_SUFFIX}\.nksc", ("a.jpg", "a.jpg.nksc"), "NX Studio help, adjustment files"),
    Naming("Canon DPP", rf"{_STEM}\.(?:vrd|dr4)", ("a.jpg", "a.vrd"), "exiftool, metadata sidecar files"),
    Naming("exiv2, exiftool", rf"{_STEM}\.(?:exv|mie|exif)", ("a.jpg", "a.exv"), "exiftool, metadata sidecar files"),
    Naming("exiftool", rf"{_STEM}{_SUFFIX}_original", ("a.jpg", "a.jpg_original"), "exiftool, -overwrite_original"),
    Naming("iOS", rf"{_STEM}\.aae", ("IMG_0001.HEIC", "IMG_0001.AAE"), "elodie issue 341, osxphotos PR 1113"),
    Naming("iOS", rf"{_STEM}_O\.aae", ("IMG_0001.HEIC", "IMG_0001_O.AAE"), "makelive issue 36", GUESS),
    Naming(
        *("iOS", r"IMG_[EO](?P<n>\d{4}.*)\.(?:aae|mov)", ("IMG_0001.HEIC", "IMG_O0001.AAE")),
        *("osxphotos issue 2043: adjustments of the original", GUESS, r"IMG_\g<n>"),
    ),
    Naming(
        *("iOS", rf"{_STEM}\.aae", ("IMG_E0001.JPG", "IMG_0001.AAE"), "osxphotos PR 1113: IMG_0001, edited"),
        image=r"(IMG_)E(\d{4}.*)",
        counts_as=r"\1\2",
    ),
    Naming("iOS Live Photo", rf"{_STEM}\.(?:mov|mp4)", ("IMG_0001.HEIC", "IMG_0001.mov"), "immich issue 4209", PAIR),
    Naming(
        *("iCloud Photos Downloader", rf"{_STEM}_HEVC\.mov", ("IMG_0001.HEIC", "IMG_0001_HEVC.MOV")),
        *("icloud_photos_downloader issues 1043 and 1065", PAIR | GUESS),
    ),
    Naming("Samsung", rf"{_STEM}\.(?:mp4|dng)", ("20240101_120000.jpg", "20240101_120000.dng"), "Expert RAW", PAIR),
    Naming("cameras, RAW+JPEG", rf"{_STEM}\.{_RAW}", ("DSC_0001.JPG", "DSC_0001.NEF"), "DCF 2.0: DCF objects", PAIR),
    Naming("cameras", rf"{_STEM}\.(?:m4v|avi|3gp|mpg)", ("DSC_0001.JPG", "DSC_0001.AVI"), "DCF 2.0: DCF objects", PAIR),
    Naming("cameras", rf"{_STEM}\.(?:thm|wav)", ("DSC_0001.JPG", "DSC_0001.WAV"), "DCF 2.0; Nikon, voice memos"),
    Naming(
        *("Canon PowerShot", r"SND_(?P<n>\d{4}.*)\.wav", ("IMG_0001.JPG", "SND_0001.WAV"), "Canon, sound memos"),
        *(GUESS, r"IMG_\g<n>"),
    ),
    Naming("Google Pixel", rf"{_STEM}\.(?:mp|mv)(?:~\d+)?", ("PXL_1.MP.jpg", "PXL_1.MP"), "GPTH issue 381", PAIR),
    Naming("Google Pixel", rf"{_STEM}\.(?:mp|mv)(?:~\d+)?", ("PXL_1.MP~2.jpg", "PXL_1.MP~2"), "GPTH PR 384", PAIR),
    Naming("Google Pixel", rf"{_STEM}\.(?:mp4|dng)", ("PXL_1.MP.jpg", "PXL_1.dng"), "memories issue 927", PAIR),
    Naming(
        *("Google Pixel", rf"{_STEM}\.dng", ("PXL_1.RAW-01.MP.COVER.jpg", "PXL_1.RAW-02.ORIGINAL.dng")),
        *("Pixel Camera help, RAW+JPEG", PAIR),
        image=r"(.+\.RAW-)01(.*?)(?:\.MP)?\.COVER(\.[^.]+)",
        counts_as=r"\g<1>02\2.ORIGINAL\3",
    ),
    Naming(
        *("Google Takeout", rf"{_TITLE}(?:\.{_SUPPLEMENT})?\.json", ("a.jpg", "a.jpg.supplemental-metadata.json")),
        "ente PR 4956, GPTH PR 449: any beginning of the word",
    ),
    Naming("Google Takeout", rf"{_STEM}\.json", ("a.jpg", "a.json"), "google-photos-exif: sidecars without the suffix"),
    Naming(
        *("Google Takeout", rf"{_TITLE}(?:\.{_SUPPLEMENT})?{_NUMBER}\.json"),
        *(("a(1).jpg", "a.jpg.supplemental-metadata(1).json"), "ente PR 4956, google-takeout-fixer issue 1"),
    ),
    Naming(
        *("Google Takeout", rf"(?P<cut>.{{{_CUT}}}){_NUMBER}?\.json"),
        ("Urlaub in Knaufspesch in der Schneifel (38).JPG", "Urlaub in Knaufspesch in der Schneifel (38).JP.json"),
        *("GPTH issue 8, memories issue 1559: 51 characters with .json", GUESS),
    ),
    Naming(
        *("Google Takeout", rf"{_TITLE}(?:\.{_SUPPLEMENT})?{_NUMBER}?\.json", ("a-edited.jpg", "a.jpg.json")),
        "immich-go, google-takeout.md: an edited image has the sidecar of its original",
        image=rf"(.+)-(?:{_EDITED})((?: ?\(\d+\))*\.[^.]+)",
        counts_as=r"\1\2",
    ),
    Naming("labels, notes", rf"{_STEM}\.(?:txt|xml|json)", ("a.jpg", "a.txt"), "labelImg, LabelMe: a file by the stem"),
    Naming(
        *("downloaders, notes", rf"{_STEM}{_SUFFIX}\.(?:txt|xml|json|wav|thm|aae|on1|acr)", ("a.jpg", "a.jpg.txt")),
        "gallery-dl, post-processor metadata: a file by the whole name",
    ),
    Naming("instaloader", rf"{_STEM}\.json\.xz", ("a.jpg", "a.json.xz"), "instaloader, metadata files"),
)

_CONFLICT = re.compile(
    r" ?\([^()]*conflicted copy[^()]*\)"  # Dropbox, ownCloud, Nextcloud, OpenCloud
    r"| ?\[[^\[\]]*conflict[^\[\]]*\]"  # pCloud
    r"| ?\((?:SFConflict|Conflict_)[^()]*(?:\([^()]*\)[^()]*)?\)"  # Seafile, FileCloud
    r"|\.sync-conflict-\d{8}-\d{6}(?:-\w+)?"  # Syncthing
    r"|\.Conflict\d*(?=\.)"  # Resilio
    r"|_[^_]+_[A-Z][a-z]{2}-\d\d-\d{4}-\d{4}_\w*Conflict(?:_\d+)?"  # Synology Drive
    r"|-(?:DESKTOP|LAPTOP)-[A-Z0-9]{7}(?=\.)",  # OneDrive
    re.IGNORECASE,
)
"""What synchronisers insert into the name of a conflicting version; removed before matching."""

_COMPILED = tuple(
    (re.compile(pattern, re.IGNORECASE), tuple(naming for naming in NAMINGS if naming.pattern == pattern))
    for pattern in dict.fromkeys(naming.pattern for naming in NAMINGS)
)
_IMAGE_PATTERNS = {naming.image: re.compile(naming.image, re.IGNORECASE) for naming in NAMINGS if naming.image}
_OF_SOME_IMAGES = tuple(naming for naming in NAMINGS if naming.image)
_PAIRS = frozenset({*FILMS, *RAWS})
_COMPOUND = re.compile(r"\.(?:MP|MV)(?:~\d+)?$|(?:\.MP)?\.COVER$|\.ORIGINAL$", re.IGNORECASE)
_OF_CHAIN = frozenset({*(one[1:] for one in (*IMAGES, *RAWS, *FILMS)), "cover", "original", "out", "reason", "json"})
_LINK = re.compile(r"([^ (]*?)(?:~\d+)?((?: ?\(\d+\))*)")
_APPLE = re.compile(r"img_[eo]?(\d{4}.*)")
_OF_EDITED = re.compile(rf"(.+)-(?:{_EDITED})((?: ?\(\d+\))*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that moves with its image."""

    name: str
    shared: bool  # another image, which stays, needs it as well: it is copied


@dataclass(frozen=True, slots=True)
class Claim:
    """The image to which a file's name refers, by one naming."""

    naming: Naming
    stem: str
    suffix: str | None  # None: any suffix
    number: str = ""  # also in the image's stem
    is_cut: bool = False  # ``stem`` is the beginning of the image's name
    is_pair: bool = False
    yields: bool = False


def split_name(name: str) -> tuple[str, str]:
    """Return stem and suffix (with its dot) of a base name; ``.MP.jpg`` is one suffix."""
    stem, suffix = os.path.splitext(name)
    if len(os.fsencode(suffix)) > LONGEST_SUFFIX:
        return name, ""
    short = _COMPOUND.sub("", stem)
    return (short, name[len(short) :]) if short else (stem, suffix)


def fold(name: str) -> str:
    """Return a name for comparison without case."""
    return name.casefold()


def is_image(name: str) -> bool:
    """Tell whether a name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGES


@lru_cache(maxsize=4096)
def base_of(name: str) -> str:
    """Return the stem that all files of an image have in common.

    ``a.jpg.xmp``, ``a.docx`` and ``a.jpg`` have the same base; ``a.jpg(1).json`` has that of ``a(1).jpg``.
    """
    stem, suffix = split_name(name)
    numbers = ""
    while True:
        rest, _, last = stem.rpartition(".")
        link = _LINK.fullmatch(last)
        if not rest or link is None:
            return stem + numbers
        word = link[1].lower()
        if word not in _OF_CHAIN and not (suffix.lower() == ".json" and _SUPPLEMENTAL.startswith(word)):
            return stem + numbers
        stem, numbers = rest, link[2] + numbers


@lru_cache(maxsize=4096)
def claims(name: str) -> tuple[Claim, ...]:
    """Return the images to which a file's name refers; none if it is not the name of a companion."""
    if is_image(name):
        return ()
    found = list(_claims(name, yields=False))
    plain = _CONFLICT.sub("", name)
    if plain != name and not is_image(plain):
        found += _claims(plain, yields=True)
    return tuple(found)


def _claims(name: str, *, yields: bool) -> Iterable[Claim]:
    for pattern, namings in _COMPILED:
        if (match := pattern.fullmatch(name)) is not None:
            yield from (_claim(naming, match, yields=yields or GUESS in naming.kind) for naming in namings)


def _claim(naming: Naming, match: re.Match[str], *, yields: bool) -> Claim:
    groups = match.groupdict()
    number = groups.get("number") or ""
    if "cut" in groups:
        return Claim(naming, groups["cut"], None, number, is_cut=True, yields=yields)
    suffix = groups.get("suffix")
    # A note about a film or a raw moves with it, and therefore with any image of the stem.
    is_of_pair = suffix is not None and suffix.lower() in _PAIRS
    suffix = None if is_of_pair else suffix
    return Claim(
        naming,
        match.expand(naming.stem) + number,
        suffix,
        number,
        is_pair=is_of_pair or PAIR in naming.kind,
        yields=yields,
    )


def claim_on(name: str, image: str) -> Claim | None:
    """Return the most reliable claim of a file on an image; None if it does not belong to it."""
    fitting = [claim for claim in claims(name) if _fits(claim, image)]
    return min(fitting, key=lambda claim: (claim.yields, claim.is_pair), default=None)


def _fits(claim: Claim, image: str) -> bool:
    if claim.is_cut:
        stem, suffix = os.path.splitext(image)
        return (stem.removesuffix(claim.number) + suffix if claim.number else image).startswith(claim.stem) and (
            stem.endswith(claim.number) and len(image) > _CUT + len(claim.number)
        )
    named = _counted_as(claim.naming, image)
    if named is None:
        return False
    stem, suffix = os.path.splitext(named)
    if stem != claim.stem and split_name(named)[0] != claim.stem:
        return False
    return claim.suffix is None or suffix.lower() == claim.suffix.lower()


def _counted_as(naming: Naming, image: str) -> str | None:
    if not naming.image:
        return image
    match = _IMAGE_PATTERNS[naming.image].fullmatch(image)
    return None if match is None else match.expand(naming.counts_as)


def companions_of(image: str, beside: Iterable[str], *, stays: bool = False) -> tuple[Companion, ...]:
    """Return the companions of an image among the regular files ``beside``, at least those that ``near`` finds.

    A film or raw shared by several images is not copied; it moves with the last of them. If the image ``stays``, none
    of them is the last, and each has the film or raw.
    """
    others = sorted(set(beside) - {image})
    images = [name for name in others if is_image(name)]
    found = []
    for name in others:
        claim = claim_on(name, image)
        if claim is None:
            continue
        rivals = [rival for other in images if (rival := claim_on(name, other)) is not None]
        if claim.yields and any(not rival.yields for rival in rivals):
            continue
        is_shared = any(claim.yields or not rival.yields for rival in rivals)
        if stays or not (is_shared and claim.is_pair):
            found.append(Companion(name, shared=is_shared))
    return tuple(found)


def owners_of(name: str, beside: Iterable[str]) -> tuple[str, ...]:
    """Return the images among these names to which a file belongs."""
    return tuple(image for image in beside if image != name and is_image(image) and claim_on(name, image) is not None)


def near(name: str) -> tuple[tuple[str, bool], ...]:
    """Return the folded beginnings of the names of all files that may belong to the same image.

    Each is paired with whether it is a whole stem, which no letter or digit follows.
    """
    base = fold(base_of(name))
    stems = [base, *sorted(reach(name)), *(f"{one[:-1]}1" for one in reach(name) if one.endswith(".raw-02"))]
    if (apple := _APPLE.fullmatch(base)) is not None:
        stems += [f"{start}{apple[1]}" for start in ("img_", "img_e", "img_o", "snd_")]
    if (edited := _OF_EDITED.fullmatch(base)) is not None:
        stems.append(edited[1])
    starts = [fold(claim.stem) for claim in claims(name) if claim.is_cut]
    if (numbered := re.fullmatch(r"(.+)\(\d+\)", base)) is not None and not numbered[1].endswith(" "):
        starts += [f"{numbered[1]}.", f"{numbered[1]}-"]
    return tuple(dict.fromkeys([*((one, True) for one in stems if one), *((one, False) for one in starts)]))


@lru_cache(maxsize=4096)
def reach(name: str) -> frozenset[str]:
    """Return the folded stems of files that would count as parts of the same image in this file's folder."""
    found = {base_of(name)}
    if not is_image(name):
        return frozenset(fold(stem) for stem in (*found, *(base_of(claim.stem) for claim in claims(name))))
    found |= {base_of(counted) for naming in _OF_SOME_IMAGES if (counted := _counted_as(naming, name)) is not None}
    if len(name) > _CUT:
        stem, suffix = os.path.splitext(name)
        found |= {name[:_CUT], (re.sub(r"\(\d+\)$", "", stem) + suffix)[:_CUT]}
    return frozenset(fold(stem) for stem in found)


def starts_of_images(name: str) -> tuple[tuple[str, str], ...]:
    """Return the ranges (first <= name < second) that contain the images of a companion."""
    ranges = []
    for claim in claims(name):
        base = base_of(claim.stem)
        if claim.is_cut:
            ranges.append((claim.stem, f"{claim.stem}\U0010ffff"))
            continue
        stems = {claim.stem, base, re.sub(r"\(\d+\)$", "", base), base.replace(".RAW-02", ".RAW-01")}
        stems |= {f"IMG_E{stem[4:]}" for stem in stems if stem.startswith("IMG_")}
        # A dot, a hyphen or a bracket follows a stem: a character between space and slash.
        ranges += [(stem, f"{stem}0") for stem in stems]
    return tuple(dict.fromkeys(ranges))


def parts_beside(companion: str, image: str) -> tuple[str, str]:
    """Return the parts of a companion's name before and after the number that is added if a name is taken."""
    stem, suffix = split_name(image)
    claim = claim_on(companion, image)
    if claim is not None and claim.is_cut:
        return stem, f"{suffix}.json"
    if companion.startswith(stem):
        return stem, companion[len(stem) :]
    if claim is not None and claim.number:
        return stem, companion[len(claim.stem) - len(claim.number) :].replace(claim.number, "", 1)
    base = base_of(companion)
    return (base, companion[len(base) :]) if companion.startswith(base) else split_name(companion)


def name_beside(companion: str, image: str, final: str) -> str:
    """Return the new name of a companion of an image that was renamed from ``image`` to ``final``."""
    if final == image:
        return companion
    (stem, suffix), (new_stem, _) = split_name(image), split_name(final)
    base, tail = parts_beside(companion, image)
    if base != stem and new_stem.startswith(stem):
        return base + new_stem[len(stem) :] + tail
    if suffix and tail.lower().startswith(suffix.lower()):
        return final + tail[len(suffix) :]
    return new_stem + (tail if base == stem else os.path.splitext(companion)[1])
