"""The browser of all tests of a process."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.daemon_process import PATIENCE_SECONDS
from tests.review.world import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A browser, started once; each test has a context of its own."""
    from playwright.sync_api import expect

    expect.set_options(1000 * PATIENCE_SECONDS)
    with chromium() as started:
        yield started
