"""A real ``sortd review`` in a process of its own, and a real browser or a plain client in front of it."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode, urlsplit

import pytest

from tests.daemon_process import PATIENCE_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
FLAGS = (
    "--no-sandbox",  # root cannot use it, and the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LARGE_BYTES = 100 << 20
ROOT = Path(__file__).parents[2]
PHONE: "ViewportSize" = {"width": 390, "height": 844}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium")


class ReviewProcess:
    """``sortd review`` on a free port, or on a Unix socket."""

    def __init__(self, config: Path, *arguments: str, state: Path | None = None) -> None:
        """Start it, and wait until it can be asked."""
        self._errors = config.parent / "review.log"
        self._url_file = (state or config.parent / "state") / "review.url"
        self._url_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sortd", "review", "-c", str(config), *(arguments or ("--port", "0"))]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=ROOT)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._url_file.is_file():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.url = self._url_file.read_text(encoding="utf-8").strip()
        """The address with the token."""
        parts = urlsplit(self.url)
        self.origin = f"{parts.scheme}://{parts.netloc}"

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._errors.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, and check that it ended well."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(PATIENCE_SECONDS) == 0, self.log
        finally:
            self.process.kill()
            self.process.wait()


class Client:
    """A client without a browser, with the cookie of a session."""

    def __init__(self, review: ReviewProcess) -> None:
        """Enter with the token of the address."""
        self._host = urlsplit(review.origin).netloc
        self.cookie = ""
        response = self.get(urlsplit(review.url).path)
        assert response.status == http.client.SEE_OTHER
        self.cookie = response.headers["set-cookie"].partition(";")[0]

    def get(self, path: str, **headers: str) -> "Reply":
        """Send a GET request, and return the reply without following it."""
        return self._send("GET", path, None, headers)

    def post(self, path: str, form: "Mapping[str, str] | list[tuple[str, str]]", **headers: str) -> "Reply":
        """Send a form of the same origin; the field ``token`` is that of the page."""
        fields = [*(form.items() if isinstance(form, Mapping) else form)]
        sent = {"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Site": "same-origin", **headers}
        return self._send("POST", path, urlencode(fields), sent)

    def token(self, path: str) -> str:
        """Return the token of the forms of a page."""
        found = re.search(r'name="token" value="([^"]+)"', self.get(path).text)
        assert found is not None
        return found[1]

    def _send(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> "Reply":
        connection = http.client.HTTPConnection(self._host, timeout=PATIENCE_SECONDS)
        try:
            cookie = {"Cookie": self.cookie} if self.cookie else {}
            connection.request(method, path, body, {**cookie, **headers})
            return Reply(connection.getresponse())
        finally:
            connection.close()


class Reply:
    """A response that was read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        """Read it."""
        self.status, self.headers, self.content = response.status, response.headers, response.read()

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode()


@contextmanager
def chromium(*flags: str) -> "Iterator[Browser]":
    """Start the browser of the system, with more flags."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def session(browser: "Browser", review: ReviewProcess, **options: object) -> "Iterator[BrowserContext]":
    """Open a session of a person: its first page is the one that the token leads to."""
    context = browser.new_context(**options)  # type: ignore[arg-type]  # the options of playwright
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    try:
        context.new_page().goto(review.url)
        yield context
    finally:
        context.close()


def press_keys(page: "Page", *keys: str) -> None:
    """Press keys, each as soon as the page takes them: not at once after an answer by key."""
    for key in keys:
        page.locator('html[data-keys="ready"]').wait_for()
        page.keyboard.press(key)


def load_with_groups(page: "Page") -> None:
    """Load the page of what waits again until it shows the groups."""
    while page.locator(".grouping").inner_text():
        page.reload()


def copy_sample(folder: Path) -> Path:
    """Copy the sample data with its references only, and return its dataset."""
    moved = shutil.ignore_patterns("Images", "Dataset", "Review", "Rejected")
    return Path(shutil.copytree(ROOT / "Data", folder / "Data", ignore=moved)) / "Tornillos"


def every_file(root: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, but for those of sortd, by relative path."""
    found = {}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != ".sortd"]
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # it is moved just now
                path = Path(folder) / name
                facts = path.lstat()
                is_small = stat.S_ISREG(facts.st_mode) and facts.st_size < LARGE_BYTES
                found[os.fspath(path.relative_to(root))] = path.read_bytes() if is_small else b"large or special"
    return found
