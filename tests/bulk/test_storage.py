"""Files and objects by their URI, on this disk, in S3 (moto's server) and in a store of fsspec."""

import os
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

from sortd.bulk.storage import list_images, local_path, read_bytes, store_of, uri_of
from sortd.errors import DataError
from tests.hostile_files import HOSTILE

KEYS = ("a.jpg", "b c/ñ%20#?.png", "d/e/f.JPEG", "d/x[1].jpg")
"""Names as a store has them, which URLs would escape."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket with images and other objects, in a server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store_of.cache_clear()
        maker = S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        maker.create_dir("photos")
        for key in (*KEYS, "b c/.hidden.png", "b c/text.txt", "d/half.jpg.part"):
            with maker.open_output_stream(f"photos/{key}") as stream:
                stream.write(b"bytes of " + key.encode())
        yield "s3://photos"
        store_of.cache_clear()
    server.stop()


def refuse(error: OSError) -> None:
    """Fail for whatever cannot be read."""
    raise AssertionError(error)


def listed(source: str) -> set[str]:
    """Return the URIs of the images of a source."""
    errors: list[OSError] = []
    found = {image.uri for image in list_images(source, report=errors.append)}
    assert not errors
    return found


def test_bucket_folder_glob_and_object_are_listed(bucket: str) -> None:
    """Names are not escaped; hidden, unfinished and other objects are left out."""
    assert listed(bucket) == listed(f"{bucket}/") == {f"{bucket}/{key}" for key in KEYS}
    assert listed(f"{bucket}/d") == {f"{bucket}/d/e/f.JPEG", f"{bucket}/d/x[1].jpg"}
    assert listed(f"{bucket}/**/*.png") == {f"{bucket}/b c/ñ%20#?.png"}
    assert listed(f"{bucket}/*.jpg") == {f"{bucket}/a.jpg"}
    assert listed(f"{bucket}/d/x[1].jpg") == {f"{bucket}/d/x[1].jpg"}


def test_object_has_size_time_and_content(bucket: str) -> None:
    """What is listed is what is read; a limit on bytes holds."""
    (image,) = list_images(f"{bucket}/b c/ñ%20#?.png", report=refuse)
    content = read_bytes(image.uri, limit=100)
    assert content == "bytes of b c/ñ%20#?.png".encode()
    assert image.size == len(content)
    assert image.mtime_ns is not None
    with pytest.raises(OSError, match="limit"):
        read_bytes(image.uri, limit=10)
    with pytest.raises(OSError, match="none"):
        read_bytes(f"{bucket}/none.jpg", limit=10)


def test_absent_bucket_folder_and_scheme_are_refused(bucket: str) -> None:
    """The message names the source."""
    for source in (f"{bucket}/nothing", "s3://no-such-bucket/x", "nowhere://a/b"):
        with pytest.raises(DataError, match=source.partition("://")[0]):
            list(list_images(source, report=refuse))


def test_key_with_an_empty_folder_name_is_reported(bucket: str) -> None:
    """Pyarrow lists such a folder as an entry of itself, and the listing ends nevertheless."""
    assert bucket
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket="slashes")
    for key in ("sub//a.jpg", "sub/b.jpg"):
        client.put_object(Bucket="slashes", Key=key, Body=b"x")
    errors: list[OSError] = []
    found = list_images("s3://slashes", report=errors.append)
    assert [image.uri for image in islice(found, 2)] == ["s3://slashes/sub/b.jpg"]
    assert ["//" in str(error) for error in errors] == [True]


def test_store_of_fsspec_is_read() -> None:
    """Any file system that fsspec knows serves, as that of the Hugging Face hub."""
    fsspec.filesystem("memory").pipe({"/hub/a.jpg": b"123", "/hub/words.txt": b"4"})
    (image,) = list_images("memory:///hub", report=refuse)
    assert (image.uri, image.size) == ("memory:///hub/a.jpg", 3)
    assert read_bytes(image.uri, limit=3) == b"123"


def test_folder_is_listed_by_the_rules_of_the_daemon(tmp_path: Path) -> None:
    """Links, hidden and unfinished files, and what is no image by name and content, are left out."""
    folder = tmp_path / "photos"
    for place in (folder / "deep" / "er", folder / ".hidden", folder / "half" / "way"):
        place.mkdir(parents=True)
        (place / "a.jpg").write_bytes(b"x")
    (folder / "nameless").write_bytes(b"\xff\xd8\xff\xe0")
    for name in ("words.txt", "b.jpg.part", ".c.jpg", "d.jpg", "d.jpg.aria2", "half.aria2", "raw.cr2"):
        (folder / name).write_bytes(b"x")
    (folder / "link.jpg").symlink_to("nameless")
    (folder / "around").symlink_to(folder)
    assert listed(os.fspath(folder)) == {os.fspath(folder / "nameless"), os.fspath(folder / "deep" / "er" / "a.jpg")}
    assert listed(os.fspath(folder / "**" / "*.jpg")) == {os.fspath(folder / "deep" / "er" / "a.jpg")}


@pytest.mark.parametrize("kind", HOSTILE)
def test_folder_with_hostile_entries_is_listed(tmp_path: Path, kind: str) -> None:
    """A pipe is not waited for, and a link is not followed, with or without the suffix of an image."""
    for name in ("a.jpg", "without"):
        HOSTILE[kind](tmp_path / name)
    assert listed(os.fspath(tmp_path)) == ({os.fspath(tmp_path / "a.jpg")} if kind == "sparse file" else set())


def test_name_that_is_not_utf8_is_a_url(tmp_path: Path) -> None:
    """Arrow's strings are UTF-8; the URL leads back to the same bytes."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff%20 a.jpg")
    Path(path).write_bytes(b"abc")
    (uri,) = listed(os.fspath(tmp_path))
    assert uri.startswith("file:///")
    assert uri == uri_of(path)
    assert local_path(uri) == path
    assert read_bytes(uri, limit=3) == b"abc"
    assert local_path(uri_of("/a%20b://c")) == "/a%20b://c"


def test_file_that_cannot_be_looked_into_is_reported(tmp_path: Path) -> None:
    """The listing goes on after a folder that is closed."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.jpg").write_bytes(b"x")
    errors: list[OSError] = []
    assert len(list(list_images(os.fspath(tmp_path), report=errors.append))) == 1
    assert len(errors) == 1


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    """So is a file, which is no folder, and a socket."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "socket"))
    for name in ("nothing", "a.jpg", "socket", "nothing/*.jpg"):
        with pytest.raises(DataError, match="is no folder"):
            list(list_images(os.fspath(tmp_path / name), report=refuse))
