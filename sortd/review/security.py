"""What may reach the pages: ASGI middleware that checks each request, and sets the headers of each response.

A request passes if all of these hold; else the answer is a short page, and the pages do not see it.

1. It is GET, HEAD or POST of a plain path, within the limits of size; GET and HEAD have no body.
2. Its Host is an address of this server (DNS rebinding).
3. It has the cookie of a session. ``/enter/<token>`` gives one, with the token of this start of the server.
4. A browser sends it for this site (Sec-Fetch-Site); other sites may only link to a page.
5. A POST also has the form token of its session, which pages read from ``request.state.form_token``.

A GET changes nothing but the cookie. What the browser could be made to do by another site is in docs/review.md.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from html import escape
from http import HTTPStatus
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortd.commands.console import printable
from sortd.logs import REVIEW_FAILED, REVIEW_REFUSED

ENTRY: Final = "/enter/"
TARGET_BYTES: Final = 4096
HEADER_BYTES: Final = 16 << 10
BODY_BYTES: Final = 1 << 20
BODY_SECONDS: Final = 20.0
"""How long the body of a POST may take."""
DISCARD_SECONDS: Final = 2.0
"""How long the body of a refused request is read, before the answer."""
POSTS_PER_SECOND, POSTS_AT_ONCE = 20.0, 60
WRONG_TOKENS_PER_SECOND, WRONG_TOKENS_AT_ONCE = 1.0, 10
MOST_SESSIONS: Final = 1000
"""Sessions whose number of requests is known; beyond that, all counts are reset."""

_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(?::([0-9]{1,5}))?")
_HTTP_PORT: Final = 80
_METHODS: Final = ("GET", "HEAD", "POST")
_FORM: Final = "application/x-www-form-urlencoded"
_BAD: Final = HTTPStatus.BAD_REQUEST.value

_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: Final = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # Also makes browsers send `Origin: null` with forms; those that send Sec-Fetch-Site do not need it.
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()"),
)
"""Of each response, whatever a page sets; ``cache-control`` is no-store unless a page sets it."""

_OPEN_ADDRESS = (
    "Open the address that sortd review printed when it started. "
    "The file review.url in its state folder has it too; only the user that runs sortd review can read that file."
)
_TEXTS = {
    _BAD: "The request is not valid.",
    403: "Go back, reload the page, and try again.",
    404: "There is no such page. It may have been about an image that has moved since.",
    405: "This page does not take such a request.",
    500: "This is an error of sortd. The log of sortd review says more about it. No file was lost by it.",
}


class RefusedRequest(Exception):  # noqa: N818 -- it is an answer, no error of sortd
    """The answer to a request that does not reach the pages."""

    def __init__(self, status: int, cause: str, text: str = "", *, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Record the status, the cause for the log, the text of the page, and more headers."""
        super().__init__(cause)
        self.status, self.cause, self.text, self.headers = status, cause, text, tuple(headers)


class Bucket:
    """A token bucket: how often something may happen."""

    def __init__(self, per_second: float, at_once: int, clock: Callable[[], float]) -> None:
        """Allow ``at_once`` times at first, and ``per_second`` more."""
        self._rate, self._most, self._clock = per_second, at_once, clock
        self._left, self._at = float(at_once), clock()

    def take(self) -> bool:
        """Tell whether it may happen now, and count it if so."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Access:
    """The token, the sessions and the addresses of one start of the server.

    A session is a random number and its signature with a key of this start, so that none must be stored.
    """

    def __init__(
        self, *, port: int | None, proxy: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a token.

        ``port`` must be in the Host of a request to loopback; None: any, as `ssh -L` of a socket needs. ``proxy`` is
        the host, and port if not 443, of a proxy that ends TLS; ``clock`` is for the limits of rate.
        """
        self.token = secrets.token_urlsafe(32)
        self._port, self._proxy, self._clock = port, proxy and proxy.lower(), clock
        self._key = secrets.token_bytes(32)
        self.wrong_tokens = Bucket(WRONG_TOKENS_PER_SECOND, WRONG_TOKENS_AT_ONCE, clock)
        self._posts: dict[str, Bucket] = {}

    def origin_of(self, host: str) -> str | None:
        """Return the origin of the pages at a Host; None if this server has no such address."""
        host = host.lower()
        if host == self._proxy:
            return f"https://{host}"
        found = _LOOPBACK.fullmatch(host)
        if found is None or self._port not in {None, int(found[2] or _HTTP_PORT)}:
            return None
        return f"http://{host}"

    def is_own_origin(self, origin: str, host: str) -> bool:
        """Tell whether an Origin is that of a page at this Host, or at the proxy, which may send another Host."""
        return origin == self.origin_of(host) or (self._proxy is not None and origin == f"https://{self._proxy}")

    def cookie_name(self, host: str) -> str:
        """Return the name of the cookie at a Host: browsers send cookies of one host to all of its ports."""
        return f"sortd-{host.rpartition(':')[2] if re.search(r':[0-9]+$', host) else 'review'}"

    def new_session(self) -> str:
        """Return the value of the cookie of a new session."""
        number = secrets.token_hex(16)
        return f"{number}.{self._sign('session', number)}"

    def is_session(self, cookie: str) -> bool:
        """Tell whether the value of a cookie is from ``new_session``."""
        number, _, signature = cookie.partition(".")
        return _is_equal(signature, self._sign("session", number))

    def form_token(self, session: str) -> str:
        """Return what a form of a session must carry."""
        return self._sign("form", session)

    def may_post(self, session: str) -> bool:
        """Count a POST of a session; return whether it is within the limit of rate."""
        if session not in self._posts and len(self._posts) >= MOST_SESSIONS:
            self._posts.clear()
        return self._posts.setdefault(session, Bucket(POSTS_PER_SECOND, POSTS_AT_ONCE, self._clock)).take()

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}:{text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _is_equal(text: str, secret: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(text.encode("utf-8", "replace"), secret.encode())


def error_page(status: int, text: str = "") -> bytes:
    """Return a page about an error."""
    title = HTTPStatus(status).phrase if status in {*HTTPStatus} else "Error"
    return _page(title, f"<p>{escape(text or _TEXTS.get(status, 'The request cannot be answered.'))}</p>")


def _page(title: str, content: str, *, head: str = "") -> bytes:
    """Return a page without style, since styles need a session too."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - sortd</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{head}</head>'
        f"<body><main><h1>{escape(title)}</h1>{content}</main></body></html>\n"
    ).encode()


def secured(app: ASGIApp, access: Access) -> ASGIApp:
    """Return an application that passes to ``app`` only the requests that it may see."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # and no WebSocket, which no page opens
                await app(scope, receive, send)
            return
        answer, incoming = _Answer(send), _Incoming(receive)
        try:
            given = await _admit(scope, incoming, answer, access)
        except RefusedRequest as refusal:
            await _refuse(refusal, scope, incoming, answer)
            return
        if given is not None:
            await _run(app, scope, given, answer)

    return guarded


class _Incoming:
    """Receives a request, and tells whether its body is complete: `receive` would then wait for the end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_complete = False

    async def __call__(self) -> Message:
        """Receive a message."""
        message = await self._receive()
        self.is_complete = not message.get("more_body", False)
        return message


class _Answer:
    """Sends one response, with ``HEADERS``; an error that is plain text, as Starlette's own are, becomes a page."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = self._is_page = False

    async def __call__(self, message: Message) -> None:
        """Send a message of the application."""
        if message["type"] != "http.response.start":
            if not self._is_page:
                await self._send(message)
            return
        headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
        kind = dict(headers).get(b"content-type", b"")
        if message["status"] >= _BAD and kind.startswith(b"text/plain"):
            kept = [header for header in headers if header[0] in {b"allow", b"retry-after", b"connection"}]
            await self.page(message["status"], headers=kept)
            return
        await self._start(message["status"], headers)

    async def page(self, status: int, text: str = "", *, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a page about an error."""
        await self.html(status, error_page(status, text), headers=headers)

    async def html(self, status: int, body: bytes, *, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole page."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [(b"content-type", b"text/html; charset=utf-8"), length, *headers])
        self._is_page = True
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_started = True
        ours = {name for name, _ in HEADERS}
        own = [header for header in headers if header[0] not in ours]
        cached = [] if any(name == b"cache-control" for name, _ in own) else [(b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *cached, *HEADERS]})


async def _run(app: ASGIApp, scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Run the application; an exception becomes a log line and a page without its text."""
    try:
        await app(scope, receive, answer)
    except Exception as error:  # noqa: BLE001 -- whatever a page raises, the server continues
        structlog.get_logger("sortd").error(REVIEW_FAILED, path=_shown_path(scope), exc_info=error)
        if not answer.is_started:
            await answer.page(500)


async def _refuse(refusal: RefusedRequest, scope: Scope, incoming: _Incoming, answer: _Answer) -> None:
    """Answer a refused request and close its connection, of which nobody reads the rest."""
    host = printable(", ".join(_values(scope, b"host")))[:200]
    line = {"refusal": refusal.cause, "status": refusal.status, "method": scope["method"], "host": host}
    structlog.get_logger("sortd").info(REVIEW_REFUSED, **line, path=_shown_path(scope))
    if refusal.status != HTTPStatus.REQUEST_TIMEOUT and not _values(scope, b"expect"):
        await _discard(incoming)
    await answer.page(refusal.status, refusal.text, headers=[*refusal.headers, (b"connection", b"close")])


async def _discard(incoming: _Incoming) -> None:
    """Read what is left of a body, up to its limit: a client that still sends would not see the answer."""
    left = BODY_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0 and not incoming.is_complete:
                left -= len((await incoming()).get("body", b""))


def _shown_path(scope: Scope) -> str:
    """Return the path of a request for the log, without a token."""
    path = str(scope["path"])
    return printable(f"{ENTRY}..." if path.startswith(ENTRY) else path)[:200]


# ---------------------------------------------------------------- the checks, in their order


async def _admit(scope: Scope, receive: Receive, answer: _Answer, access: Access) -> Receive | None:
    """Return from what the application receives the request; None if it is answered. Raises RefusedRequest."""
    _check_form(scope)
    host = _host(scope, access)
    if str(scope["path"]).startswith(ENTRY):
        await _enter(scope, answer, access, host)
        return None
    _check_site(scope)
    session = _session(scope, access, host)
    scope.setdefault("state", {})["form_token"] = access.form_token(session)
    return await _checked_post(scope, receive, access, host, session) if scope["method"] == "POST" else receive


def _check_form(scope: Scope) -> None:
    """Check method, path, and the sizes of path and headers."""
    if scope["method"] not in _METHODS:
        raise RefusedRequest(405, "method", headers=[(b"allow", ", ".join(_METHODS).encode())])
    raw, path = bytes(scope["raw_path"]), str(scope["path"])
    if len(raw) + len(scope["query_string"]) > TARGET_BYTES:
        raise RefusedRequest(414, "target_size", f"The address is longer than {TARGET_BYTES} bytes.")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
        raise RefusedRequest(431, "header_size", f"The headers are longer than {HEADER_BYTES} bytes.")
    segments = path.split("/")[1:]
    is_plain = all(segments[:-1]) and not {".", ".."} & {*segments} and not any(c < " " or c == "\x7f" for c in path)
    if not raw.startswith(b"/") or not is_plain:
        raise RefusedRequest(_BAD, "path", "The path is not valid.")
    lengths, codings = _values(scope, b"content-length"), _values(scope, b"transfer-encoding")
    has_body = bool(codings) or any(length.strip() != "0" for length in lengths)
    if (scope["method"] != "POST" and has_body) or (codings and lengths):
        raise RefusedRequest(_BAD, "body")


def _host(scope: Scope, access: Access) -> str:
    """Return the Host, which must be an address of this server."""
    hosts = _values(scope, b"host")
    if len(hosts) != 1:
        raise RefusedRequest(_BAD, "host_count")
    if access.origin_of(hosts[0]) is None:
        raise RefusedRequest(421, "host", f"sortd review has no such address. {_OPEN_ADDRESS}")
    return hosts[0]


async def _enter(scope: Scope, answer: _Answer, access: Access, host: str) -> None:
    """Begin a session for the token in the path, and redirect to the first page.

    The right token always passes, whoever tries wrong ones: with 256 random bits, no rate makes guessing feasible.
    """
    if scope["method"] != "GET":
        raise RefusedRequest(405, "method", headers=[(b"allow", b"GET")])
    if not _is_equal(str(scope["path"]).removeprefix(ENTRY), access.token):
        if not access.wrong_tokens.take():  # the first few get an ordinary answer
            raise RefusedRequest(429, "token_rate", "Too many wrong addresses.", headers=[(b"retry-after", b"1")])
        raise RefusedRequest(403, "token", f"This address is not, or no longer, valid. {_OPEN_ADDRESS}")
    is_tls = str(access.origin_of(host)).startswith("https:")
    cookie = f"{access.cookie_name(host)}={access.new_session()}; Path=/; HttpOnly; SameSite=Strict"
    headers = [(b"set-cookie", f"{cookie}{'; Secure' * is_tls}".encode())]
    if _values(scope, b"sec-fetch-site") == ["cross-site"]:
        # Browsers send no Strict cookie after a redirect that another site began; they do after one of this page.
        refresh = '<meta http-equiv="refresh" content="0; url=/">'
        await answer.html(200, _page("Review", '<p><a href="/">Continue</a></p>', head=refresh), headers=headers)
        return
    await answer.html(303, b"", headers=[(b"location", b"/"), *headers])


def _check_site(scope: Scope) -> None:
    """Check that another site does not embed this one: it may only link to a page."""
    site = _values(scope, b"sec-fetch-site")
    is_link = [_values(scope, b"sec-fetch-mode"), _values(scope, b"sec-fetch-dest")] == [["navigate"], ["document"]]
    if scope["method"] != "POST" and site not in ([], ["same-origin"], ["none"]) and not is_link:
        raise RefusedRequest(403, "site")


def _session(scope: Scope, access: Access, host: str) -> str:
    """Return the session of the cookie."""
    pairs = (pair.strip().partition("=") for value in _values(scope, b"cookie") for pair in value.split(";"))
    name = access.cookie_name(host)
    # Another server on this host, at any port, may have set a cookie of the same name: one of them must be ours.
    found = next((value for key, _, value in pairs if key == name and access.is_session(value)), None)
    if found is None:
        raise RefusedRequest(403, "session", f"This browser has no session. {_OPEN_ADDRESS}")
    return found


async def _checked_post(scope: Scope, receive: Receive, access: Access, host: str, session: str) -> Receive:
    """Check a POST, and return from what the application receives its body."""
    site, origin = _values(scope, b"sec-fetch-site"), _values(scope, b"origin")
    if site != ["same-origin"] and (site or len(origin) != 1 or not access.is_own_origin(origin[0], host)):
        raise RefusedRequest(403, "cross_site", "Another site sent this request.")
    if [value.partition(";")[0].strip().lower() for value in _values(scope, b"content-type")] != [_FORM]:
        raise RefusedRequest(415, "content_type", "Only forms are accepted.")
    if not access.may_post(session):
        raise RefusedRequest(429, "rate", "Too many requests; wait a second.", headers=[(b"retry-after", b"1")])
    body = await _body(scope, receive)
    given = _values(scope, b"x-sortd-token") + _fields(body, b"token")
    if not given or not all(_is_equal(text, access.form_token(session)) for text in given):
        raise RefusedRequest(403, "form_token")
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Return the body, read within the limits of size and time."""
    too_large = RefusedRequest(413, "body_size", f"The request is larger than {BODY_BYTES:,} bytes.")
    if any(int(length) > BODY_BYTES for length in _values(scope, b"content-length")):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if len(body) > BODY_BYTES:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise RefusedRequest(408, "body_time", f"The request took longer than {BODY_SECONDS:.0f} seconds.") from error
    raise RefusedRequest(_BAD, "disconnect")


def _fields(body: bytes, name: bytes) -> list[str]:
    """Return the values of a field of a form; they need no decoding, as a token has no special characters."""
    return [part[len(name) + 1 :].decode("latin-1") for part in body.split(b"&") if part.startswith(name + b"=")]


def _values(scope: Scope, name: bytes) -> list[str]:
    """Return the values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
