"""What reaches the pages, and what does not: over real connections, byte by byte."""

import html
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog.testing

from sortd.review.security import (
    BODY_BYTES,
    HEADER_BYTES,
    POSTS_AT_ONCE,
    TARGET_BYTES,
    WRONG_TOKENS_AT_ONCE,
    Access,
    error_page,
)
from sortd.review.server import LimitedProtocol
from tests.daemon_process import PATIENCE_SECONDS
from tests.review.served import FORM, Reply, Served, nothing_changes, parsed, received_from, serving

POLICY = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server for all tests that leave it as it was."""
    with serving() as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Served:
    """That server; its application has seen nothing."""
    shared.seen.clear()
    return shared


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def assert_refused(reply: Reply, status: int, served: Served) -> None:
    """A refusal is a page in plain words with all headers, and the application has not seen the request."""
    assert (reply.status, served.seen) == (status, [])
    assert_page(reply)
    assert reply.headers["Connection"] == "close"
    assert "Set-Cookie" not in reply.headers


def assert_page(reply: Reply) -> None:
    """The page of an error has HTML, all headers, and no trace of the program."""
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.text.startswith('<!doctype html><html lang="en">') or reply.method == "HEAD"
    assert "Traceback" not in reply.text
    assert "secret" not in reply.text
    assert_headers(reply)


def assert_headers(reply: Reply, **others: str) -> None:
    """A response has each header of the policy once, and neither names the server nor opens it to other sites."""
    expected = POLICY | {name.replace("_", "-"): value for name, value in others.items()}
    assert {name: reply.headers.get_all(name) for name in expected} == {n: [v] for n, v in expected.items()}
    assert "camera=()" in str(reply.headers["Permissions-Policy"])
    names = {name.lower() for name in reply.headers}
    assert not names & {"server", "date", "x-powered-by"}
    assert not [name for name in names if name.startswith("access-control-")]


# ---------------------------------------------------------------- headers and errors


@pytest.mark.parametrize("target", ["/", "/?a=b", "/names/%C3%B1.%20%22"])
def test_secured_page_has_all_headers(served: Served, target: str) -> None:
    """A page that the browser shows is stored nowhere, and embedded nowhere."""
    reply = served.ask(target)
    assert (reply.status, len(served.seen)) == (200, 1)
    assert_headers(reply)


def test_secured_head_has_the_headers_and_no_body(served: Served) -> None:
    """HEAD is GET without the body."""
    reply = served.ask(method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert_headers(reply)


def test_secured_picture_may_be_cached_and_keeps_the_policy(served: Served) -> None:
    """An application sets how long something is kept, but not another policy."""
    assert_headers(served.ask("/picture"), cache_control="private, max-age=31536000, immutable")


@pytest.mark.parametrize(("method", "target", "status"), [("GET", "/nowhere", 404), ("POST", "/picture", 405)])
def test_secured_error_of_starlette_becomes_a_page(method: str, target: str, status: int) -> None:
    """Starlette's own errors are two words of plain text; some versions make them in a thread of the server."""
    with serving() as served:
        reply = served.post(target=target) if method == "POST" else served.ask(target)
    assert reply.status == status
    assert_page(reply)
    assert (reply.headers["Allow"] is not None) == (status == 405)


def test_secured_error_with_a_page_of_its_own_keeps_it(served: Served) -> None:
    """Pages may say more about an error."""
    reply = served.ask("/missed")
    assert (reply.status, reply.text) == (404, "<p>our own page</p>")
    assert_headers(reply)


def test_secured_exception_is_logged_and_not_shown(served: Served) -> None:
    """The person gets a page in plain words, the log the traceback."""
    with structlog.testing.capture_logs() as lines:
        reply = served.ask("/fails")
    assert reply.status == 500
    assert_page(reply)
    [line] = [line for line in lines if line["event"] == "review.failed"]
    assert (line["path"], str(line["exc_info"])) == ("/fails", "secret of /fails")


def test_secured_exception_in_a_response_ends_the_connection(served: Served) -> None:
    """A client can tell that a response is not complete."""
    with structlog.testing.capture_logs() as lines, served.connected() as connection:
        head = f"GET /fails-late HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\n\r\n"
        connection.sendall(head.encode())
        received = received_from(connection)
    assert b"begun" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert [line["event"] for line in lines] == ["review.failed"]


def test_secured_page_of_an_error_escapes_markup() -> None:
    """Texts of errors are no markup."""
    page = error_page(404, "<script>&").decode()
    assert "<script>" not in page
    assert html.escape("<script>&") in page


def test_nothing_changes_sees_each_kind_of_change(tmp_path: Path) -> None:
    """What other tests use to show that no GET changes anything can fail."""
    file = tmp_path / "file"
    file.write_text("a")
    with nothing_changes(tmp_path):
        assert file.read_text() == "a"
    at = file.stat().st_mtime_ns

    def rewrite() -> None:
        file.write_text("b")
        os.utime(file, ns=(at, at))

    for change in (rewrite, (tmp_path / "new").touch, lambda: file.chmod(0o600), file.unlink):
        with pytest.raises(AssertionError), nothing_changes(tmp_path):
            change()


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_secured_host_of_loopback_passes(served: Served, name: str) -> None:
    """These names mean this machine in every browser."""
    assert served.ask("/", {"Host": f"{name}:{served.port}"}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}", "evil.example", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1.evil.example:{port}",
        "localhost.:{port}", "localhost:{port}.evil.example", "evil.example@127.0.0.1:{port}", "0.0.0.0:{port}",
        "127.1:{port}", "2130706433:{port}", "[::ffff:127.0.0.1]:{port}", "127.0.0.1:{port}0", "",
    ],
)  # fmt: skip
def test_secured_other_host_is_misdirected(served: Served, host: str) -> None:
    """A name of another site that resolves to loopback (DNS rebinding) shows nothing, with or without a session."""
    assert_refused(served.ask("/", {"Host": host.format(port=served.port)}), 421, served)


def test_secured_other_host_cannot_enter(served: Served) -> None:
    """Not even the token gives a session to another name."""
    assert_refused(served.ask(f"/enter/{served.access.token}", {"Host": "evil.example"}), 421, served)


@pytest.mark.parametrize("lines", ["", "Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n", "Host: a\r\nhost: a\r\n"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_secured_host_missing_or_double_is_refused(served: Served, lines: str, version: str) -> None:
    """Two programs may read two different hosts of them."""
    head = f"GET / HTTP/{version}\r\n{lines.format(port=served.port)}Cookie: {served.headers['Cookie']}\r\n\r\n"
    assert_refused(served.exchange(head.encode()), 400, served)


def test_secured_absolute_target_is_refused(served: Served) -> None:
    """Its host would count instead of Host, by RFC 9112; only proxies are asked so."""
    for target in (f"http://{served.host}/", "http://evil.example/", "evil.example:80", "*"):
        assert_refused(served.ask(target), 400, served)


def test_secured_forwarded_headers_do_not_count(served: Served) -> None:
    """Nobody says by X-Forwarded-* from where and to where a request is."""
    given = {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    given["Forwarded"] = "for=203.0.113.9;host=evil.example;proto=https"
    assert {key: served.ask("/", given).facts[key] for key in ("client", "scheme")} == {
        "client": "127.0.0.1",
        "scheme": "http",
    }
    assert served.ask("/", {"Host": "evil.example", "X-Forwarded-Host": served.host}).status == 421


def test_access_behind_a_proxy_knows_its_host_and_no_other() -> None:
    """The name of the proxy is one more host, with TLS, and the cookie is for TLS only."""
    with serving(proxy="Review.Example.org") as served:
        entered = served.ask(f"/enter/{served.access.token}", {"Host": "review.example.org"})
        assert (entered.status, entered.headers["Location"]) == (303, "/")
        cookie, *attributes = str(entered.headers["Set-Cookie"]).split("; ")
        assert {*attributes} == {"Path=/", "HttpOnly", "SameSite=Strict", "Secure"}
        proxied = {"Host": "review.example.org", "Cookie": cookie}
        assert served.ask("/", proxied).status == 200
        assert served.ask().status == 200
        assert served.ask("/", {**proxied, "Host": "review.example.org:8443"}).status == 421
        session = cookie.partition("=")[2]
        origin = {"Sec-Fetch-Site": None, "Origin": "https://review.example.org"}
        token = served.access.form_token(session)
        assert served.post("", {**proxied, **origin}, token=token).status == 200
        assert served.post("", {**proxied, **origin, "Origin": "http://review.example.org"}, token=token).status == 403
        assert served.post("", origin).status == 200  # a proxy may send its own Host


def test_access_of_a_socket_knows_loopback_at_each_port() -> None:
    """`ssh -L 9000:/run/review.sock` leads to a port that the server cannot know."""
    access = Access(port=None)
    assert access.origin_of("localhost:9000") == "http://localhost:9000"
    assert access.origin_of("127.0.0.1") == "http://127.0.0.1"
    assert access.origin_of("evil.example:9000") is None
    assert Access(port=80).origin_of("127.0.0.1") == "http://127.0.0.1"
    assert not access.is_own_origin("https://None", "localhost:9000")


# ---------------------------------------------------------------- the token and the session


def test_secured_token_begins_a_session(served: Served) -> None:
    """The address that sortd printed gives a cookie that no script reads and no other site sends."""
    reply = served.ask(f"/enter/{served.access.token}", {"Cookie": None})
    assert (reply.status, reply.headers["Location"]) == (303, "/")
    cookie, *attributes = str(reply.headers["Set-Cookie"]).split("; ")
    assert {*attributes} == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert cookie.startswith(f"sortd-{served.port}=")
    assert served.access.token not in cookie
    assert_headers(reply)
    assert served.ask("/", {"Cookie": f"other=1; {cookie}; more=2"}).status == 200


def test_secured_token_serves_two_people(served: Served) -> None:
    """Each has a session and form tokens of their own."""
    first, second = (
        str(served.ask(f"/enter/{served.access.token}").headers["Set-Cookie"]).partition(";")[0] for _ in range(2)
    )
    tokens = [served.ask("/", {"Cookie": cookie}).facts["form_token"] for cookie in (first, second)]
    assert first != second
    assert tokens[0] != tokens[1]
    assert served.post("", {"Cookie": first}, token=tokens[0]).status == 200
    assert served.post("", {"Cookie": second}, token=tokens[0]).status == 403


def test_secured_token_from_another_site_continues_from_its_own_page(served: Served) -> None:
    """After a redirect that a link in a mail began, browsers would not send a Strict cookie."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    reply = served.ask(f"/enter/{served.access.token}", link)
    assert (reply.status, "Location" in reply.headers) == (200, False)
    assert '<meta http-equiv="refresh" content="0; url=/">' in reply.text
    assert '<a href="/">' in reply.text
    assert "SameSite=Strict" in str(reply.headers["Set-Cookie"])
    assert_headers(reply)


@pytest.mark.parametrize("change", ["", "x", "{token}x", "{half}", "{token}/", "{token}%00", "%FF", "{lower}"])
def test_secured_wrong_token_begins_no_session(change: str) -> None:
    """Nothing but the very token does."""
    with serving() as served:
        token = served.access.token
        wrong = change.format(token=token, half=token[:20], lower=token.swapcase())
        reply = served.ask(f"/enter/{wrong}", {"Cookie": None})
        assert_refused(reply, 400 if "%00" in wrong else 403, served)
        assert token not in reply.text


def test_secured_wrong_tokens_are_limited_for_all() -> None:
    """After ten, one a second; the right one passes all the same, so that nobody locks its owner out."""
    clock = Clock()
    with serving(clock=clock) as served:
        statuses = [served.ask("/enter/wrong").status for _ in range(WRONG_TOKENS_AT_ONCE + 2)]
        assert statuses == [403] * WRONG_TOKENS_AT_ONCE + [429] * 2
        refused = served.ask("/enter/wrong")
        assert_refused(refused, 429, served)
        assert refused.headers["Retry-After"] == "1"
        assert served.ask(f"/enter/{served.access.token}").status == 303
        clock.now += 1.0
        assert [served.ask("/enter/wrong").status for _ in range(2)] == [403, 429]


def test_secured_wrong_token_is_not_logged(served: Served) -> None:
    """A token with a typing error is nearly the token."""
    with structlog.testing.capture_logs() as lines:
        served.ask("/enter/nearly-right")
    assert [(line["event"], line["refusal"], line["path"]) for line in lines] == [
        ("review.refused", "token", "/enter/...")
    ]


@pytest.mark.parametrize("method", ["POST", "HEAD"])
def test_secured_token_is_taken_by_get_only(served: Served, method: str) -> None:
    """Another method is no address that a person opens."""
    reply = served.ask(f"/enter/{served.access.token}", method=method)
    assert_refused(reply, 405, served)
    assert reply.headers["Allow"] == "GET"


@pytest.mark.parametrize("target", ["/", "/picture", "/events", "/nowhere", "/static/review.css"])
def test_secured_request_without_session_says_what_to_open(served: Served, target: str) -> None:
    """Without the cookie nothing is shown, not even that a page does not exist."""
    reply = served.ask(target, {"Cookie": None})
    assert_refused(reply, 403, served)
    assert "Open the address that sortd review printed" in reply.text


@pytest.mark.parametrize(
    "change", ["{name}=", "{name}=1", "{name}={number}.0", "{name}=0.{sign}", "sortd={value}", "é=é"]
)
def test_secured_forged_cookie_is_no_session(served: Served, change: str) -> None:
    """A session has the signature of this start of the server, under the name of this port."""
    name, _, value = served.headers["Cookie"].partition("=")
    number, _, sign = value.partition(".")
    cookie = change.format(name=name, value=value, number=number, sign=sign)
    assert_refused(served.ask("/", {"Cookie": cookie}), 403, served)


def test_secured_cookie_of_another_server_of_the_host_does_no_harm(served: Served) -> None:
    """Browsers send cookies of one host to all its ports, so another program may have set one of the same name."""
    name = served.headers["Cookie"].partition("=")[0]
    assert served.ask("/", {"Cookie": f"{name}=theirs; {served.headers['Cookie']}"}).status == 200
    assert len(served.seen) == 1


def test_access_session_of_an_earlier_start_is_none() -> None:
    """Each start has a token and a key of its own."""
    first, second = Access(port=1), Access(port=1)
    assert first.token != second.token
    assert len(first.token) >= 43
    assert first.is_session(first.new_session())
    assert not second.is_session(first.new_session())


# ---------------------------------------------------------------- other sites


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "same-origin, cross-site", ""])
def test_secured_post_of_another_site_is_refused(served: Served, site: str) -> None:
    """Even with cookie, form token and a good Origin: the browser's word counts. Another port is `same-site`."""
    reply = served.post("", {"Sec-Fetch-Site": site, "Origin": f"http://{served.host}"})
    assert_refused(reply, 403, served)


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://{host}", "http://127.0.0.1:1", "http://{host}/"]
)
def test_secured_post_without_fetch_metadata_needs_its_origin(served: Served, origin: str | None) -> None:
    """An old browser says by Origin who sends a form."""
    given = origin and origin.format(host=served.host)
    assert_refused(served.post("", {"Sec-Fetch-Site": None, "Origin": given}), 403, served)


def test_secured_post_without_fetch_metadata_passes_with_its_origin(served: Served) -> None:
    """As it does from a page of this server."""
    assert served.post("", {"Sec-Fetch-Site": None, "Origin": f"http://{served.host}"}).status == 200


def test_secured_post_with_two_sites_is_refused(served: Served) -> None:
    """A header that comes twice is not a browser's."""
    body = f"token={served.form_token}".encode()
    head = (
        f"POST / HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\nContent-Type: {FORM}\r\n"
        f"Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    assert_refused(served.exchange(head.encode() + body), 403, served)


@pytest.mark.parametrize("token", ["", "wrong", "{other}", "{token}x", "{token}&token=wrong"])
def test_secured_post_needs_the_form_token_of_its_session(served: Served, token: str) -> None:
    """A site that could send the cookie still cannot know it."""
    other = served.access.form_token(served.access.new_session())
    reply = served.post(token=token.format(token=served.form_token, other=other))
    assert_refused(reply, 403, served)


def test_secured_post_takes_the_form_token_from_field_or_header(served: Served) -> None:
    """A form has a field, the script a header; the body arrives unchanged."""
    field = served.post("image=1&image=2")
    assert field.facts["body"] == f"token={served.form_token}&image=1&image=2"
    header = served.post("image=1", {"X-Sortd-Token": served.form_token}, token="")
    assert header.facts["body"] == "image=1"
    assert served.post("", {"X-Sortd-Token": served.form_token}).status == 200
    wrong = served.post("", {"X-Sortd-Token": "wrong"})
    assert wrong.status == 403


def test_secured_form_token_of_a_page_is_the_one_that_counts(served: Served) -> None:
    """Pages read it from the state of the request."""
    token = served.ask().facts["form_token"]
    assert served.post(token=token).status == 200


def test_secured_form_token_in_the_address_does_not_count(served: Served) -> None:
    """An address is stored in histories."""
    assert_refused(served.post(target=f"/?token={served.form_token}", token=""), 403, served)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/json", "multipart/form-data; boundary=x", f"{FORM}x"]
)
def test_secured_post_that_is_no_form_is_refused(served: Served, kind: str | None) -> None:
    """Each other kind is one more reader of hostile bytes."""
    assert_refused(served.post("", {"Content-Type": kind}), 415, served)


def test_secured_post_without_session_is_refused(served: Served) -> None:
    """The form token alone is nothing."""
    assert_refused(served.post("", {"Cookie": None}), 403, served)


def test_secured_posts_are_limited_for_each_session() -> None:
    """60 at once, then 20 a second; another session has its own number, and GET has none."""
    clock = Clock()
    with serving(clock=clock) as served:
        statuses = [served.post().status for _ in range(POSTS_AT_ONCE + 2)]
        assert statuses == [200] * POSTS_AT_ONCE + [429] * 2
        assert served.post().headers["Retry-After"] == "1"
        assert served.ask().status == 200
        clock.now += 0.1
        assert [served.post().status for _ in range(3)] == [200, 200, 429]
        served.enter()
        assert served.post().status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(
    "how", [("no-cors", "image"), ("navigate", "iframe"), ("cors", "empty"), ("no-cors", "script")]
)
def test_secured_page_of_another_site_cannot_embed_this_one(served: Served, site: str, how: tuple[str, str]) -> None:
    """Another port of this host is `same-site`, so its requests have the cookie."""
    mode, kind = how
    reply = served.ask("/", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": kind})
    assert_refused(reply, 403, served)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "same-origin"])
def test_secured_page_may_be_linked_to(served: Served, site: str) -> None:
    """A link shows a page; a GET changes nothing."""
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert served.ask("/", link).status == 200


# ---------------------------------------------------------------- the form of a request


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"])
def test_secured_other_method_is_refused(served: Served, method: str) -> None:
    """There are three methods; a preflight of another site gets no permission either."""
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = served.ask("/", preflight, method=method)
    assert_refused(reply, 405, served)
    assert reply.headers["Allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize(
    "target",
    [
        "/../etc/passwd", "/names/../../etc/passwd", "/%2e%2e/etc/passwd", "/names/%2e%2e%2fetc/passwd", "/names/..",
        "//etc/passwd", "/names//etc/passwd", "/names/%2fetc/passwd", "/.", "/names/.", "/names/./a", "/%2E/",
        "/names/..%2f..", "/names/a%00.jpg",
        "/names/a%0d%0aSet-Cookie:x", "/names/a%7f", "names", "//evil.example/", "/%2fevil.example/",
    ],
)  # fmt: skip
def test_secured_path_that_is_not_plain_is_refused(served: Served, target: str) -> None:
    """A path that could mean another one, in whatever spelling, reaches no page."""
    assert_refused(served.ask(target), 400, served)


@pytest.mark.parametrize(
    ("name", "decoded"),
    [
        ("%252e%252e/etc/passwd", "%2e%2e/etc/passwd"),
        ("..%5c..%5cetc", "..\\..\\etc"),
        ("...", "..."),
        ("%c0%ae%c0%ae/etc", "\ufffd\ufffd\ufffd\ufffd/etc"),
    ],
)
def test_secured_path_of_strange_names_is_only_a_name(served: Served, name: str, decoded: str) -> None:
    """Nothing decodes a path twice, or takes other characters for a slash or a dot."""
    assert served.ask(f"/names/{name}").status == 200
    assert served.seen == [("GET", f"/names/{decoded}")]


def test_secured_long_target_is_refused(served: Served) -> None:
    """An address has at most 4096 bytes, with its query."""
    assert served.ask("/?" + "q" * (TARGET_BYTES - 10)).status == 200
    served.seen.clear()
    assert_refused(served.ask("/?" + "q" * TARGET_BYTES), 414, served)
    assert_refused(served.ask("/" + "n" * TARGET_BYTES), 414, served)


def test_secured_large_headers_are_refused(served: Served) -> None:
    """Whether they come at once or in parts, the answer is a refusal, and the pages see nothing."""
    reply = served.ask("/", {"X-Large": "x" * HEADER_BYTES})
    assert reply.status in {400, 431}
    assert_refused(reply, reply.status, served)
    with served.connected() as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {served.host}\r\n".encode())
        try:
            for _ in range(1000):
                connection.sendall(b"X-More: " + b"x" * 100 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        received_from(connection)
    assert served.seen == []


@pytest.mark.parametrize(
    "sent", [b"\r\n\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n"]
)
def test_secured_bytes_that_are_no_request_get_a_page(served: Served, sent: bytes) -> None:
    """Also what uvicorn itself refuses has all headers; a client with TLS is one of them."""
    with served.connected() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = received_from(connection)
    if received:
        assert_refused(parsed(received), 400, served)
    assert served.seen == []


@pytest.mark.parametrize("lines", ["Content-Length: 5", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_secured_get_with_a_body_is_refused(served: Served, method: str, lines: str) -> None:
    """Nobody would read it."""
    name, _, value = lines.partition(": ")
    body = b"hello" if value == "5" else b"5\r\nhello\r\n0\r\n\r\n"
    assert_refused(served.ask("/", {name: value}, method=method, body=body), 400, served)


def test_secured_two_lengths_of_a_body_are_refused(served: Served) -> None:
    """A proxy could read another request in the body (request smuggling)."""
    two = {"Transfer-Encoding": "chunked", "Content-Length": "5", "Content-Type": FORM}
    assert_refused(served.ask("/", two, method="POST", body=b"0\r\n\r\n"), 400, served)


def chunked(body: bytes) -> bytes:
    """Return a body in chunks of 1000 bytes."""
    parts = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def test_secured_body_up_to_the_limit_arrives(served: Served) -> None:
    """1 MiB, whole or in chunks."""
    fields = f"token={served.form_token}&a=".encode()
    body = fields + b"x" * (BODY_BYTES - len(fields))
    given = {"Sec-Fetch-Site": "same-origin", "Content-Type": FORM}
    assert served.ask("/", given, method="POST", body=body).facts["body"] == body.decode()
    given["Transfer-Encoding"] = "chunked"
    assert served.ask("/", given, method="POST", body=chunked(body)).facts["body"] == body.decode()


def test_secured_larger_body_is_refused_before_it_is_read(served: Served) -> None:
    """A body that is announced as too large is not waited for."""
    head = (
        f"POST / HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\nContent-Type: {FORM}\r\n"
        f"Sec-Fetch-Site: same-origin\r\nExpect: 100-continue\r\nContent-Length: {BODY_BYTES + 1}\r\n\r\n"
    )
    assert_refused(served.exchange(head.encode(), "POST"), 413, served)


def test_secured_larger_body_in_chunks_is_refused(served: Served) -> None:
    """A body of unknown size is counted while it arrives."""
    head = (
        f"POST / HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\nContent-Type: {FORM}\r\n"
        "Sec-Fetch-Site: same-origin\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert_refused(served.exchange(head.encode() + chunked(b"x" * (BODY_BYTES + 1)), "POST"), 413, served)


# ---------------------------------------------------------------- slow clients


def limited(**limits: float) -> type[LimitedProtocol]:
    """Return the protocol with other limits; a test may change them after the requests that must not be hurried."""
    return type("Limited", (LimitedProtocol,), limits)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_protocol_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    """A client cannot keep a connection by sending nothing, or the head of a request without its end."""
    protocol = limited()
    with serving(protocol=protocol) as served:
        protocol.head_seconds = 0.2
        with served.connected() as connection:
            connection.sendall(sent)
            assert received_from(connection) == b""


def test_protocol_second_head_that_does_not_come_ends_the_connection() -> None:
    """The same after a first request, where uvicorn waits only for the first byte of the next one."""
    protocol = limited()
    with serving(protocol=protocol) as served, served.connected() as connection:
        head = f"GET / HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\n"
        connection.sendall(f"{head}\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        protocol.head_seconds = 0.2
        connection.sendall(head.encode())
        assert b"HTTP/1.1" not in received_from(connection)
        assert len(served.seen) == 1


def test_protocol_client_that_does_not_receive_loses_its_connection() -> None:
    """A response that nobody takes is not kept for ever."""
    is_lost = threading.Event()

    class Observed(LimitedProtocol):
        stalled_seconds = 0.2

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.scope and self.scope["path"] == "/much":
                is_lost.set()

    with serving(protocol=Observed) as served, served.connected() as connection:
        head = f"GET /much HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\n\r\n"
        connection.sendall(head.encode())
        assert is_lost.wait(PATIENCE_SECONDS)
        assert len(received_from(connection)) < 64 << 20


def test_secured_body_that_does_not_come_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form has to arrive within a time."""
    monkeypatch.setattr("sortd.review.security.BODY_SECONDS", 0.2)
    with serving() as served:
        slow = {"Content-Length": "10", "Content-Type": FORM, "Sec-Fetch-Site": "same-origin"}
        assert_refused(served.ask("/", slow, method="POST"), 408, served)


def test_protocol_connections_are_limited() -> None:
    """One more than the limit ends at once; those before stay."""
    with serving(protocol=limited(most_connections=3)) as served:
        kept = [served.connected() for _ in range(3)]
        try:
            for connection in kept:
                head = f"GET / HTTP/1.1\r\nHost: {served.host}\r\nCookie: {served.headers['Cookie']}\r\n\r\n"
                connection.sendall(head.encode())
                assert connection.recv(12) == b"HTTP/1.1 200"
            with served.connected() as another:
                assert received_from(another) == b""
        finally:
            for connection in kept:
                connection.close()


def test_refusals_name_no_file_of_the_program() -> None:
    """No page shows where the program lies."""
    with serving() as served:
        replies = [served.ask("/fails"), served.ask("/nowhere"), served.ask("/", {"Cookie": None}), served.ask("/..")]
    for reply in replies:
        assert not re.search(r"\.py|/home|/usr|site-packages", reply.text)
