"""The review page in a real browser, in front of real processes."""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import write_config
from tests.daemon_process import DaemonProcess
from tests.review.world import (
    ReviewProcess,
    copy_sample,
    every_file,
    follow,
    load_with_groups,
    needs_browser,
    press_keys,
    session,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_browser

MOST_ACTIONS = 60


class Keyboard:
    """The keys that a person presses on a page, counted."""

    def __init__(self, page: "Page") -> None:
        """Press them on this page."""
        self.page, self.pressed = page, 0

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        press_keys(self.page, *keys)
        self.pressed += len(keys)

    def answer(self, *keys: str) -> None:
        """Press keys of which the last one sends a form, and wait for the page that follows."""
        self.press(*keys[:-1])
        follow(self.page, partial(self.press, keys[-1]))


def shown_names(page: "Page") -> list[str]:
    """Return the names of the files on the page, in their order."""
    return [text.strip() for text in page.locator(".shown a.details").all_inner_texts()]


def select_only(keys: Keyboard, wanted: set[str]) -> None:
    """Deselect by arrows and space every image but these; or first all, if they are few."""
    names = shown_names(keys.page)
    is_few = 2 * len(wanted) < len(names)
    if is_few:
        keys.press("a")
    focused = -1
    for at, name in enumerate(names):
        if (name in wanted) == is_few:
            keys.press(*["ArrowRight"] * (at - max(focused, 0) + (focused < 0)), " ")
            focused = at
    checked = keys.page.locator(".shown input:checked")
    assert checked.count() == len(wanted)


def answer_batch(keys: Keyboard, truth: dict[str, str], strange: str) -> dict[str, str]:
    """Give the images of the page that belong together their class, by the keys that a person would press.

    Returns the class that each of them got.
    """
    page = keys.page
    names = shown_names(page)
    ((label, _),) = Counter(truth[name] or strange for name in names).most_common(1)
    wanted = {name for name in names if (truth[name] or strange) == label}
    select_only(keys, wanted)
    guess = page.locator('button[data-key="Enter"]')
    chips = {text.split()[-1]: text.split()[0] for text in page.locator("button.chip[data-key]").all_inner_texts()}
    if guess.count() and guess.inner_text().split()[-2] == label:
        keys.answer("Enter")
    elif label in chips:
        keys.answer(chips[label])
    else:
        keys.answer("/", *label, "Enter")
    return dict.fromkeys(wanted, label)


def test_browser_sample_is_answered_by_keyboard_alone(browser: "Browser", tmp_path: Path) -> None:
    """As a new user: the images in Review/ get their classes, two answers are undone, strangers become a class."""
    dataset = copy_sample(tmp_path)
    truth_file = tmp_path / "truth.json"
    draw = [sys.executable, "Data/draw.py", "incoming", "--truth", str(truth_file)]
    subprocess.run(draw, check=True, cwd=tmp_path, capture_output=True)
    truth = json.loads(truth_file.read_text(encoding="utf-8"))
    before = Counter(every_file(dataset).values())
    config = write_config(tmp_path, model="packaged")
    with DaemonProcess(config, program="sortd") as daemon:
        daemon.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")
        waiting = sum(1 for path in (dataset / "Review").rglob("*") if path.is_file())
        assert waiting >= 11
        with ReviewProcess(config) as review, session(browser, review) as opened:
            (page,) = opened.pages
            keys = Keyboard(page)
            keys.answer("Enter")
            load_with_groups(page)
            undone, answered = 0, dict[str, str]()
            while page.locator(".shown").count():
                answered |= answer_batch(keys, truth, "odd")
                if undone < 2:
                    keys.answer("u")
                    undone += 1
                    assert "back" in page.locator('[data-live="effect"]').inner_text()
            assert keys.pressed < MOST_ACTIONS
            assert page.get_by_text("Nothing waits").count() == 1
        daemon.stop()
    after = every_file(dataset)
    reasons = [name for name in after if name.endswith(".reason.json")]
    assert len(reasons) == 1
    assert Counter(content for name, content in after.items() if name not in reasons) == before
    assert {f"Dataset/{label}/{name}" for name, label in answered.items()} <= set(after)
    assert not any(name.startswith(("Review/", "Images/")) for name in after)
