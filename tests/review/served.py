"""A small application behind the checks of the review page, over a real uvicorn in a thread, and a client of raw bytes.

``python -m tests.review.served review -c CONFIG [OPTION VALUE]...`` serves the application as ``sortd review`` does.
"""

import asyncio
import http.client
import io
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sortd.config import Config, read_config
from sortd.exits import exit_on_error
from sortd.review.security import Access, secured
from sortd.review.server import LimitedProtocol, ReviewServer, serve, server_config
from sortd.service import Notifier
from tests.daemon_process import PATIENCE_SECONDS

Headers = Mapping[str, str | None]
NONE: Headers = {}
FORM = "application/x-www-form-urlencoded"


async def show(request: Request) -> JSONResponse:
    """Answer with what the application sees."""
    request.app.state.seen.append((request.method, request.scope["path"]))
    body = await request.body()
    return JSONResponse(
        {
            "form_token": request.state.form_token,
            "body": body.decode(),
            "client": request.client and request.client.host,
            "scheme": request.scope["scheme"],
        }
    )


async def fail(request: Request) -> JSONResponse:
    """Raise an exception that names a file."""
    raise RuntimeError(f"secret of {request.url.path}")


async def stream(_request: Request) -> StreamingResponse:
    """Send events for ever."""

    async def events() -> AsyncIterator[str]:
        while True:
            yield "data: an event\n\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(events(), media_type="text/event-stream")


async def fail_late(_request: Request) -> StreamingResponse:
    """Begin a response and raise an exception."""

    async def parts() -> AsyncIterator[str]:
        yield "begun"
        raise RuntimeError("secret of a stream")

    return StreamingResponse(parts())


async def send_much(_request: Request) -> Response:
    """Send more than the kernel keeps for a client that does not receive."""
    return Response(b"x" * (64 << 20))


async def send_picture(_request: Request) -> Response:
    """Send what a browser may keep, with a policy that must not count."""
    headers = {"cache-control": "private, max-age=31536000, immutable", "content-security-policy": "default-src *"}
    return Response(b"jpeg", media_type="image/jpeg", headers=headers)


async def miss(_request: Request) -> HTMLResponse:
    """Answer with an error that has a page of its own."""
    return HTMLResponse("<p>our own page</p>", status_code=404)


def make_app(_config: Config | None = None) -> Starlette:
    """Return the application; ``state.seen`` is the list of the requests that it has seen."""
    app = Starlette(
        routes=[
            Route("/", show, methods=["GET", "POST"]),
            Route("/fails", fail),
            Route("/fails-late", fail_late),
            Route("/events", stream),
            Route("/much", send_much),
            Route("/picture", send_picture),
            Route("/missed", miss),
            Route("/names/{name:path}", show),
        ]
    )
    app.state.seen = []
    return app


@dataclass(frozen=True)
class Reply:
    """A response."""

    method: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        """Return the body as text."""
        return self.body.decode()

    @property
    def facts(self) -> Any:
        """Return the body that is JSON."""
        return json.loads(self.body)


class _Received(io.BytesIO):
    """What was received, as the part of a socket that HTTPResponse uses."""

    def makefile(self, _mode: str) -> Self:
        return self


def parsed(received: bytes, method: str = "GET") -> Reply:
    """Return the response in the bytes that a server sent."""
    response = http.client.HTTPResponse(_Received(received), method=method)  # type: ignore[arg-type] # see _Received
    response.begin()
    return Reply(method, response.status, response.headers, response.read())


def received_from(connection: socket.socket) -> bytes:
    """Return all bytes until the server ends the connection, in whatever way."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@dataclass
class Served:
    """A running server."""

    access: Access
    port: int
    app: Starlette
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> list[tuple[str, str]]:
        """Return the requests that the application has seen."""
        seen: list[tuple[str, str]] = self.app.state.seen
        return seen

    @property
    def host(self) -> str:
        """Return the Host of an ordinary request."""
        return f"127.0.0.1:{self.port}"

    def connected(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)

    def exchange(self, sent: bytes, method: str = "GET") -> Reply:
        """Send bytes, and return the response."""
        with self.connected() as connection:
            connection.sendall(sent)
            return parsed(received_from(connection), method)

    def ask(self, target: str = "/", headers: Headers = NONE, *, method: str = "GET", body: bytes = b"") -> Reply:
        """Send a request as a browser with a session does; a header that is None is left out."""
        own = {"Host": self.host, **self.headers, **headers}
        if method == "POST" and "Transfer-Encoding" not in own:
            own.setdefault("Content-Length", str(len(body)))
        lines = [
            f"{method} {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in own.items() if value is not None),
        ]
        return self.exchange("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body, method)

    def post(self, fields: str = "", headers: Headers = NONE, *, target: str = "/", token: str | None = None) -> Reply:
        """Send a form as a browser with a session does, with its form token unless another, or none (""), is given."""
        own = self.form_token if token is None else token
        body = "&".join(part for part in (own and f"token={own}", fields) if part).encode()
        given = {"Sec-Fetch-Site": "same-origin", "Content-Type": FORM, **headers}
        return self.ask(target, given, method="POST", body=body)

    @property
    def form_token(self) -> str:
        """Return the form token of the session."""
        return self.access.form_token(self.headers["Cookie"].partition("=")[2])

    def enter(self) -> None:
        """Begin a session."""
        reply = self.ask(f"/enter/{self.access.token}")
        self.headers["Cookie"] = str(reply.headers["Set-Cookie"]).partition(";")[0]


@contextmanager
def serving(
    *,
    protocol: type[asyncio.Protocol] = LimitedProtocol,
    clock: Callable[[], float] = time.monotonic,
    proxy: str | None = None,
) -> Iterator[Served]:
    """Serve the application on a port of loopback, in a thread, with a session for ``ask``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, app, is_ready = int(listener.getsockname()[1]), make_app(), threading.Event()
        access = Access(port=port, proxy=proxy, clock=clock)
        config = server_config(secured(app, access), Notifier({}), protocol=protocol)
        server = ReviewServer(config, is_ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="review")
        thread.start()
        try:
            assert is_ready.wait(PATIENCE_SECONDS)
            served = Served(access, port, app)
            served.enter()
            yield served
        finally:
            server.should_exit = True
            thread.join(PATIENCE_SECONDS)


@contextmanager
def nothing_changes(*folders: Path) -> Iterator[None]:
    """Fail if the block changes anything below the folders: names, inodes, modes, sizes, times or contents."""
    before = [_tree(folder) for folder in folders]
    yield
    assert [_tree(folder) for folder in folders] == before


def _tree(folder: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, sha256(content).digest())
    return found


def main() -> None:
    """Serve the application as the command does."""
    config, *options = sys.argv[3:]
    given: dict[str, Any] = dict(zip(options[::2], options[1::2], strict=True))
    with exit_on_error():
        serve(
            make_app,
            read_config(Path(config), {}),
            port=int(given["--port"]) if "--port" in given else None,
            socket=Path(given["--socket"]) if "--socket" in given else None,
            behind_proxy=given.get("--behind-proxy"),
        )


if __name__ == "__main__":
    main()
