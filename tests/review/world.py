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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode, urlsplit

import pytest

from tests.daemon_process import PATIENCE_SECONDS, launcher
from tests.launcher import PRELOADED, LaunchedProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
"""Programs that are the browser; the first one costs least."""
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
OTHER_SITE = "other.example"
"""A host of another program of this machine, for the browser."""
FLAGS = (
    "--no-sandbox",  # root cannot use it, and the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {OTHER_SITE} 127.0.0.1",
)
LARGE_BYTES = 100 << 20
ROOT = Path(__file__).parents[2]
PHONE: "ViewportSize" = {"width": 390, "height": 844}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium")


class ReviewProcess:
    """``sortd review`` on a free port, or with other options.

    ``program`` is a module that the launcher knows and that starts at once, or ``sortd`` in a process of its own.
    """

    def __init__(
        self,
        config: Path,
        *options: str,
        program: str = "sortd.cli",
        environment: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
    ) -> None:
        """Start it, and wait until it has printed its address.

        Args:
            config: its configuration; what it prints goes to a file beside that.
            options: of the command; by default any free port, or the sockets that are passed.
            program: the module that is run.
            environment: variables beside the ones of this process.
            fds: descriptors of sockets, passed as systemd does; not with the launcher.
        """
        self.config = config
        self._printed = config.parent / f"review{time.monotonic_ns()}.log"
        arguments = ["review", "-c", str(config), *(options or (() if fds else ("--port", "0")))]
        given = {**os.environ, **(environment or {})}
        self.process: LaunchedProcess | subprocess.Popen[bytes]
        with self._printed.open("wb") as output:
            if program in PRELOADED and not fds:
                self.process = launcher().start(program, arguments, given, output)
            else:
                command = [sys.executable, *_passing(fds), "-m", program, *arguments]
                self.process = subprocess.Popen(
                    command, stdout=output, stderr=output, cwd=ROOT, env=given, pass_fds=fds
                )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := re.search("^Open (.+)\n", self.log, re.MULTILINE)) is None:
            assert self.process.poll() is None, f"exit {self.process.poll()}: {self.log}"
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        self.url = found[1]
        """The address with the token."""
        parts = urlsplit(self.url)
        self.origin = f"{parts.scheme}://{parts.netloc}"

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._printed.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it unless it has ended, and check that it ended well."""
        try:
            assert (self.process.poll() or self.stop()) == 0, self.log
        finally:
            self.process.kill()
            self.process.wait()


def _passing(fds: Sequence[int]) -> list[str]:
    """Return the arguments of a Python that passes descriptors from 3 on, as systemd does, to the Python after it."""
    if not fds:
        return []
    moves = "".join(f"os.dup2({fd}, {3 + at})\n" for at, fd in enumerate(fds))
    variables = f"LISTEN_PID=str(os.getpid()), LISTEN_FDS='{len(fds)}'"
    run = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return ["-c", f"import os, sys\nos.environ.update({variables})\n{moves}{run}"]


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
def chromium() -> "Iterator[Browser]":
    """Start the browser of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
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


def follow(page: "Page", act: Callable[[], object]) -> None:
    """Do what leads to another page, and wait until that is loaded: a click or a key does not wait for it."""
    with page.expect_navigation():
        act()


def load_without(page: "Page", pattern: str) -> None:
    """Load a page again once it has no such text; meanwhile the server is asked, which costs less than to draw it."""
    while re.search(pattern, page.content()):
        while re.search(pattern, page.request.get(page.url).text()):
            time.sleep(0.1)
        page.reload()


def load_with_groups(page: "Page") -> None:
    """Load the page of what waits again once it shows the groups."""
    load_without(page, 'data-live="grouping">[^<]')


def expect_effect(page: "Page", text: str) -> None:
    """Wait until a page says what an act did."""
    from playwright.sync_api import expect

    expect(page.locator(".effect")).to_contain_text(text)


def file_into(page: "Page", label: str) -> None:
    """File the selected images into a class whose name is typed."""
    page.get_by_placeholder("class", exact=False).fill(label)
    page.get_by_role("button", name="File there").click()


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
