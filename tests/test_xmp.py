"""XMP: keywords come into and out of sidecars in every form, and nothing else in them changes."""

import re
import shutil
import subprocess
import sys

import pytest

from sortd.xmp import SidecarError, with_class, without_class

RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
DC = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'
DIGIKAM = 'xmlns:digiKam="http://www.digikam.org/ns/1.0/"'


def sidecar(description: str, before: str = "") -> bytes:
    """Return a sidecar with this in its rdf:RDF."""
    return f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {RDF}>{description}</rdf:RDF></x:xmpmeta>'.encode()


FORMS = {
    "no description": sidecar(""),
    "empty rdf": f"<rdf:RDF {RDF}/>".encode(),
    "empty description": sidecar('<rdf:Description rdf:about="" />'),
    "attributes": sidecar("<rdf:Description rdf:about='' xmlns:xmp='http://ns.adobe.com/xap/1.0/' xmp:Label='a>b'/>"),
    "empty list": sidecar(f"<rdf:Description {DC}><dc:subject><rdf:Bag/></dc:subject></rdf:Description>"),
    "other prefixes": (
        b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:d="http://purl.org/dc/elements/1.1/">'
        b"<r:Description><d:subject><r:Seq>\n <r:li>x &amp; y</r:li>\n</r:Seq></d:subject></r:Description></r:RDF>"
    ),
    "default namespace": (
        b'<RDF xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:d="http://purl.org/dc/elements/1.1/">'
        b"<Description><d:subject><Bag><li>x</li></Bag></d:subject></Description></RDF>"
    ),
    "declaration and comment": sidecar(
        f"<!-- <dc:subject> --><rdf:Description {DC}><dc:subject><rdf:Bag><rdf:li><![CDATA[x]]></rdf:li></rdf:Bag>"
        "</dc:subject></rdf:Description>",
        '<?xml version="1.0" encoding="UTF-8"?>\n',
    ),
    "mark of the byte order": b"\xef\xbb\xbf" + sidecar("<rdf:Description/>"),
    "digiKam": sidecar(
        f"<rdf:Description {DIGIKAM}><digiKam:TagsList><rdf:Seq><rdf:li>a/b</rdf:li></rdf:Seq></digiKam:TagsList>"
        "</rdf:Description>"
    ),
    "other letters": sidecar(
        f"<rdf:Description {DC}><dc:subject><rdf:Bag><rdf:li>Größe 大</rdf:li></rdf:Bag></dc:subject></rdf:Description>"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", ["cat", "Größe <M6> & 大|b/c"])
def test_with_class_adds_to_every_form_and_without_class_takes_out(form: str, label: str) -> None:
    """Both lists have the class once, adding it again changes nothing, and taking it out leaves no keyword."""
    former = FORMS[form]
    added = with_class(former, label)
    assert added is not None
    assert with_class(added, label) is None
    assert added.count(b"hierarchicalSubject") == 2
    gone = without_class(added, label, former)
    assert gone is not None
    assert without_class(gone, label, former) is None
    assert label.encode() not in gone
    assert b"sortd" not in gone


@pytest.mark.parametrize("form", FORMS)
def test_with_class_keeps_every_former_byte_in_order(form: str) -> None:
    """Only insertions: without what was added, and with empty elements closed again, the bytes are the former ones."""
    former, added = FORMS[form], with_class(FORMS[form], "cat")
    assert added is not None
    rest = iter(re.sub(rb"\s*/>", b">", added))
    assert all(byte in rest for byte in re.sub(rb"\s*/>", b">", former))


def test_with_class_digikam_list_gets_its_own_form() -> None:
    """DigiKam reads its own list first, so the class is added there with its separator."""
    added = with_class(FORMS["digiKam"], "cat")
    assert added is not None
    assert b"<rdf:li>a/b</rdf:li><rdf:li>sortd/cat</rdf:li>" in added


def test_without_class_keeps_a_keyword_that_was_there_before() -> None:
    """The list that had the class keeps it."""
    former = FORMS["empty list"].replace(b"<rdf:Bag/>", b"<rdf:Bag><rdf:li>cat</rdf:li></rdf:Bag>")
    added = with_class(former, "cat")
    assert added is not None
    gone = without_class(added, "cat", former)
    assert gone is not None
    assert (gone.count(b">cat<"), gone.count(b"sortd|cat")) == (1, 0)


DEEP = b"<a>" * 200 + b"</a>" * 200
BOMB = b'<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><a>&b;</a>'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (BOMB, "document type"),
        (b"", "not well-formed"),
        (DEEP, "nested"),
        (b"\0" * 5_000_000, "larger than"),
        (sidecar("<rdf:Description>"), "not well-formed"),
        (b"<html/>", "no rdf:RDF"),
    ],
)
def test_with_class_hostile_content_is_refused(content: bytes, why: str) -> None:
    """No entity is expanded, and what is not XMP is not changed."""
    with pytest.raises(SidecarError, match=why):
        with_class(content, "cat")


def test_with_class_name_that_is_not_utf8_is_refused() -> None:
    """XML cannot hold it."""
    with pytest.raises(SidecarError, match="not UTF-8"):
        with_class(None, "caf\udce9")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize(
    "content",
    [
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{FORMS["other letters"].decode()}'.encode("utf-16"),
        sidecar(f"<rdf:Description {DC}>< dc:subject>".replace("< ", "<") + "x</dc:subject></rdf:Description>").replace(
            b"x</dc", b"<rdf:Alt><rdf:li>x</rdf:li></rdf:Alt></dc"
        ),
    ],
    ids=["UTF-16", "Alt"],
)
def test_with_class_unusual_form_is_changed(content: bytes) -> None:
    """Where this program cannot insert into the bytes, exiftool changes the sidecar."""
    added = with_class(content, "cat")
    assert added is not None
    assert b"<rdf:li>cat</rdf:li>" in added


def test_with_class_unusual_form_without_exiftool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what to install."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SidecarError, match="install exiftool"):
        with_class(FORMS["other letters"].decode().encode("utf-16"), "cat")


def test_with_class_long_tag_needs_no_memory_for_each_byte() -> None:
    """A tag of megabytes of blanks took half a gigabyte."""
    code = """
import resource
from sortd.xmp import with_class
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
content = with_class(None, "cat").replace(b"<rdf:Description", b"<rdf:Description" + b" " * 3_900_000)
with_class(content, "dog")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100_000  # kilobytes
