"""What a real browser lets another site do with the review page."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page

from tests.daemon_process import PATIENCE_SECONDS
from tests.review.served import Served, serving
from tests.review.world import OTHER_SITE, needs_browser

OTHER_PORT = "127.0.0.1"
"""A host of another program of this machine, as ``OTHER_SITE`` is; it differs from the review page only by its port."""

pytestmark = needs_browser


@dataclass(frozen=True)
class Hostile:
    """A page of another program that knows the address of the review page, and all of its tokens."""

    served: Served
    port: int
    page: Page

    def open(self, host: str, *, form_token: str = "") -> None:
        """Open it in the browser."""
        base = f"http://{self.served.host}"
        self.page.goto(f"http://{host}:{self.port}/")
        self.page.set_content(f"""
            <a id="enter" href="{base}/enter/{self.served.access.token}">enter</a> <a id="link" href="{base}/">link</a>
            <img src="{base}/picture"> <iframe src="{base}/names/framed"></iframe>
            <script src="{base}/names/read"></script>
            <form method="post" action="{base}/"><input name="token" value="{form_token}"><button>send</button></form>
        """)

    def follow(self, selector: str) -> int:
        """Click something that leads to the first page of the review, and return the status of that page."""
        with self.page.expect_navigation(url=f"http://{self.served.host}/") as navigation:
            self.page.click(selector)
        return navigation.value.status

    def enter(self) -> str:
        """Open the address with the token as a person does, and return the form token of the session."""
        self.page.goto(f"http://{self.served.host}/enter/{self.served.access.token}")
        [cookie] = self.page.context.cookies()
        return self.served.access.form_token(str(cookie["value"]))


class _Empty(http.server.BaseHTTPRequestHandler):
    """Answers with an empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def other_program() -> Iterator[int]:
    """Serve empty pages on another port, and yield that port."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hostile(browser: Browser) -> Iterator[Hostile]:
    """The other program, the review page, and a browser without a session."""
    context = browser.new_context()
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    with serving() as served, other_program() as port:
        served.seen.clear()
        yield Hostile(served, port, context.new_page())
        context.close()


def test_browser_enters_by_the_address(hostile: Hostile) -> None:
    """A typed address, or one of a terminal, leads to the first page with a session."""
    hostile.enter()
    assert hostile.page.url == f"http://{hostile.served.host}/"
    assert hostile.served.seen == [("GET", "/")]
    [cookie] = hostile.page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


@pytest.mark.parametrize("host", [OTHER_SITE, OTHER_PORT])
def test_browser_enters_by_a_link_of_another_site(hostile: Hostile, host: str) -> None:
    """A link in web mail works too, although the cookie is Strict."""
    hostile.open(host)
    assert hostile.follow("#enter") == 200
    assert hostile.served.seen == [("GET", "/")]


def test_browser_without_session_is_told_what_to_open(hostile: Hostile) -> None:
    """The page for it needs no style, and breaks no rule of its policy."""
    said: list[str] = []
    hostile.page.on("console", lambda message: said.append(message.text))
    hostile.page.goto(f"http://{hostile.served.host}/")
    assert "Open the address that sortd review printed" in hostile.page.inner_text("main")
    assert [text for text in said if "Content Security Policy" in text] == []


@pytest.mark.parametrize("host", [OTHER_SITE, OTHER_PORT])
def test_browser_refuses_a_form_of_another_site(hostile: Hostile, host: str) -> None:
    """Even if that site knew the form token."""
    token = hostile.enter()
    hostile.served.seen.clear()
    hostile.open(host, form_token=token)
    assert hostile.follow("button") == 403
    assert hostile.served.seen == []


@pytest.mark.parametrize("host", [OTHER_SITE, OTHER_PORT])
def test_browser_shows_nothing_of_the_page_in_another_site(hostile: Hostile, host: str) -> None:
    """No picture, no frame, no script, although the browser has a session."""
    hostile.enter()
    hostile.served.seen.clear()
    hostile.open(host)
    assert hostile.page.evaluate("document.querySelector('img').naturalWidth") == 0
    assert hostile.served.seen == []


def test_browser_sends_a_form_of_the_page_itself(hostile: Hostile) -> None:
    """The page's own form passes, by a button and by a script."""
    token = hostile.enter()
    form = "<form method=post action=/><input name=token value={token}><button>send</button></form>"
    hostile.page.evaluate("form => { document.body.innerHTML = form }", form.format(token=token))
    hostile.served.seen.clear()
    assert hostile.follow("button") == 200
    send = "async token => (await fetch('/', {method: 'POST', body: new URLSearchParams({token})})).status"
    assert hostile.page.evaluate(send, token) == 200
    assert hostile.served.seen == [("POST", "/"), ("POST", "/")]


def test_browser_at_another_name_sees_nothing(hostile: Hostile) -> None:
    """A site whose name resolves to this machine (DNS rebinding) gets an error, with a token or without."""
    for path in ("/", f"/enter/{hostile.served.access.token}"):
        answer = hostile.page.goto(f"http://{OTHER_SITE}:{hostile.served.port}{path}")
        assert answer is not None
        assert answer.status == 421
    assert hostile.served.seen == []
    assert hostile.page.context.cookies() == []
