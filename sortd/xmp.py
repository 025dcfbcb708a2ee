"""Keywords in XMP sidecars: the class of an image is added to, or removed from, the bytes of a sidecar.

``dc:subject`` has the class, ``lr:hierarchicalSubject`` has it below ``sortd``: Lightroom, darktable, digiKam and
exiftool read both. digiKam prefers its own list, so that one gets the class too where it exists. Items are inserted
into the bytes; everything else in a sidecar stays as another program wrote it. See the XMP Specification, Part 1.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

MOST_SIDECAR_BYTES = 4 << 20
EXIFTOOL_SECONDS = 30.0
PARENT = "sortd"
"""The keyword above the classes in hierarchical lists."""

_MOST_DEPTH = 100
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC, _LR, _DIGIKAM = (
    "http://purl.org/dc/elements/1.1/",
    "http://ns.adobe.com/lightroom/1.0/",
    "http://www.digikam.org/ns/1.0/",
)
_CONTAINERS = frozenset({f"{_RDF} {name}" for name in ("Bag", "Seq", "Alt")})
_TAG = re.compile(rb"<(?:[^>\"']++|\"[^\"]*\"|'[^']*')*+>")  # possessive: a tag of 4 MiB needs no stack
_NEW = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="sortd">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


class SidecarError(ValueError):
    """A sidecar is not XMP, or cannot be changed without a risk to what it holds."""


class _UnusualFormError(SidecarError):
    """A sidecar may be XMP, in a form that only exiftool can change."""


@dataclass(frozen=True, slots=True)
class _Property:
    """A property of XMP that lists keywords."""

    namespace: str
    name: str
    prefix: str
    exiftool: str  # its name for exiftool
    is_optional: bool = False  # only extended where it exists

    @property
    def key(self) -> str:
        return f"{self.namespace} {self.name}"


_PROPERTIES = (
    _Property(_DC, "subject", "dc", "XMP-dc:Subject"),
    _Property(_LR, "hierarchicalSubject", "lr", "XMP-lr:HierarchicalSubject"),
    _Property(_DIGIKAM, "TagsList", "digiKam", "XMP-digiKam:TagsList", is_optional=True),
)


@dataclass(slots=True)
class _Item:
    start: int
    end: int = 0
    text: str | None = ""  # None: it is no plain text


@dataclass(slots=True)
class _Element:
    """The place of an element in the bytes of a sidecar."""

    name: str  # namespace and local name
    prefix: str  # with its colon; empty for the default namespace
    start: int
    inside: int  # the offset after its start tag
    is_empty: bool  # ``<name/>``
    end: int = 0  # the offset of its end tag
    items: list[_Item] = field(default_factory=list)


class _Sidecar:
    """A parsed sidecar: where its description and its lists of keywords are."""

    def __init__(self, content: bytes) -> None:
        """Parse; raise SidecarError if the content is not XMP that can be changed."""
        if len(content) > MOST_SIDECAR_BYTES:
            raise SidecarError(f"it is larger than {MOST_SIDECAR_BYTES:,} bytes")
        if content[:2] in {b"\xff\xfe", b"\xfe\xff"}:
            raise _UnusualFormError("it is not UTF-8")
        self.content = content
        self.lists: dict[str, _Element] = {}
        self.rdf: _Element | None = None
        self.description: _Element | None = None
        self._stack: list[_Element] = []
        self._item: _Item | None = None
        self._parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.namespace_prefixes = True
        parser.XmlDeclHandler = self._declared
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        try:
            parser.Parse(content, True)
        except expat.ExpatError as error:
            raise SidecarError(f"it is not well-formed XML: {error}") from error
        if self.rdf is None:
            raise SidecarError("it is not XMP: it has no rdf:RDF")

    def keywords(self, wanted: _Property) -> list[str]:
        """Return the keywords of a property."""
        found = self.lists.get(wanted.key)
        return [] if found is None else [item.text for item in found.items if item.text is not None]

    def with_keyword(self, wanted: _Property, keyword: str) -> bytes:
        """Return the bytes with one more keyword in a property."""
        text = escape(keyword)
        if (found := self.lists.get(wanted.key)) is not None:
            item = f"<{found.prefix}li>{text}</{found.prefix}li>".encode()
            if found.items:
                last = found.items[-1]
                return self._spliced(last.end, last.end, self._blanks_before(last.start) + item)
            return self._inserted(found, item)
        names = f"xmlns:{wanted.prefix}={quoteattr(wanted.namespace)} xmlns:rdf={quoteattr(_RDF)}"
        listed = f"<rdf:Bag>\n     <rdf:li>{text}</rdf:li>\n    </rdf:Bag>"
        added = f"<{wanted.prefix}:{wanted.name} {names}>\n    {listed}\n   </{wanted.prefix}:{wanted.name}>"
        if self.description is not None:
            return self._inserted(self.description, f" {added}\n  ".encode())
        assert self.rdf is not None, "the constructor refuses a sidecar without it"
        description = (
            f' <rdf:Description xmlns:rdf={quoteattr(_RDF)} rdf:about="">\n   {added}\n  </rdf:Description>\n '
        )
        return self._inserted(self.rdf, description.encode())

    def without_keyword(self, wanted: _Property, keyword: str) -> bytes:
        """Return the bytes without a keyword in a property, if it is there."""
        items = self.lists[wanted.key].items if wanted.key in self.lists else []
        for item in items:
            if item.text == keyword:
                return self._spliced(item.start - len(self._blanks_before(item.start)), item.end, b"")
        return self.content

    def _inserted(self, element: _Element, added: bytes) -> bytes:
        """Return the bytes with something at the end of an element."""
        if not element.is_empty:
            return self._spliced(element.end, element.end, added)
        tag = self.content[element.start : element.inside]
        name = re.match(rb"<([^\s/>]+)", tag)
        assert name is not None, "expat has found a tag here"
        opened = tag[:-2].rstrip() + b">"
        return self._spliced(element.start, element.inside, opened + b"\n  " + added + b"</" + name[1] + b">")

    def _blanks_before(self, at: int) -> bytes:
        before = self.content[:at]
        return before[len(before.rstrip()) :]

    def _spliced(self, start: int, end: int, instead: bytes) -> bytes:
        return self.content[:start] + instead + self.content[end:]

    def _declared(self, _version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.lower() not in {"utf-8", "utf8", "us-ascii"}:
            raise _UnusualFormError(f"its encoding is {encoding[:20]}, not UTF-8")

    def _doctype(self, *_: object) -> None:
        raise SidecarError("it has a document type declaration, which XMP has not")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if len(self._stack) >= _MOST_DEPTH:
            raise SidecarError(f"its elements are nested more than {_MOST_DEPTH} deep")
        start = self._parser.CurrentByteIndex
        tag = _TAG.match(self.content, start)
        if tag is None:
            raise _UnusualFormError("a tag in it was not understood")
        namespace, _, rest = name.rpartition(" ") if name.count(" ") < 2 else name.partition(" ")  # noqa: PLR2004
        local, _, prefix = rest.partition(" ")
        element = _Element(
            f"{namespace} {local}", f"{prefix}:" if prefix else "", start, tag.end(), tag[0].endswith(b"/>")
        )
        above = [one.name for one in self._stack[-3:]]
        self._stack.append(element)
        if self._item is not None:
            self._item.text = None  # an item with elements is a structure
        elif element.name == f"{_RDF} RDF" and self.rdf is None:
            self.rdf = element
        elif above[-1:] == [f"{_RDF} RDF"] and element.name == f"{_RDF} Description":
            self.description = self.description or element
            if any(" ".join(key.split(" ")[:2]) in _KEYS for key in attributes):
                raise _UnusualFormError("a list of keywords in it is an attribute")
        elif above[-2:-1] == [f"{_RDF} Description"] and above[-1] in _KEYS:
            if element.name not in _CONTAINERS:
                raise _UnusualFormError("a list of keywords in it is no rdf:Bag")
            self.lists.setdefault(above[-1], element)
        elif element.name == f"{_RDF} li" and len(self._stack) > 1 and self._stack[-2] in self.lists.values():
            self._item = _Item(start)

    def _end(self, _name: str) -> None:
        element = self._stack.pop()
        element.end = element.inside if element.is_empty else self._parser.CurrentByteIndex
        if self._item is not None and element.start == self._item.start:
            tag = None if element.is_empty else _TAG.match(self.content, element.end)
            self._item.end = element.inside if tag is None else tag.end()
            self._stack[-1].items.append(self._item)
            self._item = None

    def _text(self, text: str) -> None:
        if self._item is not None and self._item.text is not None:
            self._item.text += text


_KEYS = frozenset(one.key for one in _PROPERTIES)


def with_class(content: bytes | None, label: str) -> bytes | None:
    """Return a sidecar with a class as keyword; None if it has it already. ``content`` None: there is no sidecar.

    Raises:
        SidecarError: it is not XMP, cannot be changed safely, or the name of the class is not UTF-8.
    """
    wanted = _keywords_of(label)
    try:
        former = _Sidecar(_NEW if content is None else content)
    except _UnusualFormError as error:
        merged = _by_exiftool(content or b"", wanted, error)
        _check_kept(_Sidecar(merged), {}, wanted)
        return merged
    kept = {one.key: former.keywords(one) for one in _PROPERTIES}
    changed = former
    for one, keyword in wanted:
        if keyword in changed.keywords(one) or (one.is_optional and one.key not in changed.lists):
            continue
        changed = _Sidecar(changed.with_keyword(one, keyword))
    _check_kept(changed, kept, wanted)
    return None if changed is former else changed.content


def without_class(content: bytes, label: str, former: bytes | None) -> bytes | None:
    """Return a sidecar without the keywords that were added to ``former`` for a class; None if it has none of them.

    Raises:
        SidecarError: it is not XMP, or cannot be changed safely.
    """
    before = _keywords_in(former)
    changed = begun = _Sidecar(content)
    for one, keyword in _keywords_of(label):
        if keyword not in before[one.key] and keyword in changed.keywords(one):
            changed = _Sidecar(changed.without_keyword(one, keyword))
    return None if changed is begun else changed.content


def _keywords_in(content: bytes | None) -> dict[str, list[str]]:
    try:
        sidecar = _Sidecar(_NEW if content is None else content)
    except _UnusualFormError:
        return {one.key: [] for one in _PROPERTIES}
    return {one.key: sidecar.keywords(one) for one in _PROPERTIES}


def _keywords_of(label: str) -> list[tuple[_Property, str]]:
    """Return the keyword of a class for each property; the separator of the hierarchy becomes a space in a name."""
    try:
        label.encode()
    except UnicodeEncodeError as error:
        raise SidecarError(f"the name of the class {label!r} is not UTF-8, so it cannot be a keyword") from error
    subject, hierarchical, listed = _PROPERTIES
    below = f"{PARENT}|{label.replace('|', ' ')}"
    return [(subject, label), (hierarchical, below), (listed, f"{PARENT}/{label.replace('/', ' ')}")]


def _check_kept(sidecar: _Sidecar, kept: dict[str, list[str]], wanted: Sequence[tuple[_Property, str]]) -> None:
    """Raise SidecarError unless a changed sidecar has all former keywords, in order, and the new ones."""
    for one, keyword in wanted:
        found = sidecar.keywords(one)
        former = kept.get(one.key, [])
        is_expected = not one.is_optional or one.key in sidecar.lists
        if found[: len(former)] != former or (is_expected and keyword not in found):
            raise SidecarError("its keywords could not be changed without losing some")


def _by_exiftool(content: bytes, wanted: Sequence[tuple[_Property, str]], reason: _UnusualFormError) -> bytes:
    """Return what exiftool makes of a sidecar in an unusual form; raise SidecarError if it is missing or fails."""
    program = shutil.which("exiftool")
    if program is None:
        raise SidecarError(f"{reason}; install exiftool, which can change it") from reason
    changes = [
        f"-{one.exiftool}{sign}={keyword}" for one, keyword in wanted if not one.is_optional for sign in ("-", "+")
    ]
    # Without -config "", exiftool runs code from the folder of the user.
    command = [program, "-config", "", "-q", "-q", *changes, "-o", "-", "-"]
    try:
        run = subprocess.run(command, input=content, capture_output=True, timeout=EXIFTOOL_SECONDS, check=False)  # noqa: S603 -- the values are arguments of their own
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SidecarError(f"{reason}, and exiftool did not answer: {error}") from error
    if run.returncode or not run.stdout:
        said = run.stderr.decode("utf-8", "replace").strip()[:200]
        raise SidecarError(f"{reason}, and exiftool cannot change it: {said}") from reason
    return run.stdout
