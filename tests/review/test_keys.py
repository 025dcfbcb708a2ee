"""The script of the pages in a real browser: selection and keys, forms that are sent once, layout and accessibility."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sortd.layout import Layout
from sortd.review.index import dataset_key
from tests.daemon_process import make_dataset
from tests.filed_images import file_images
from tests.review.test_pages import send_to_review
from tests.review.world import ReviewProcess, chromium, every_file, needs_browser, press_keys, session

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_browser

SMALL = """() => [...document.querySelectorAll("a, button, summary, input:not([type=hidden])")]
    .filter((one) => one.checkVisibility() && !one.closest("p, td, dialog, .skip"))
    .map((one) => [one.closest("label") ?? one, one])
    .filter(([area]) => { const box = area.getBoundingClientRect(); return box.width < 43.5 || box.height < 43.5; })
    .map(([, one]) => one.outerHTML.slice(0, 120))"""
"""The targets that a finger misses; links in a text and in a table may be smaller (WCAG 2.2, 2.5.8)."""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """One browser for all tests."""
    with chromium() as running:
        yield running


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with ten waiting images in two batches, and hostile names among the filed ones."""
    dataset = make_dataset(tmp_path / "data")
    file_images(dataset, tmp_path / "state", {"one.png": "red", "torn.png": "rejected"})
    names = {f"img{number}.png".encode(): "green" if number < 7 else "red" for number in range(10)}
    send_to_review(dataset, tmp_path / "state", dict(names))
    text = f"root: {tmp_path / 'data'}\nstate_dir: {tmp_path / 'state'}\ncache_dir: {tmp_path / 'cache'}\n"
    (tmp_path / "config.yaml").write_text(text)
    return dataset


@pytest.fixture
def page(library: Path, browser: "Browser") -> "Iterator[Page]":
    """The first batch in a browser: seven images."""
    with ReviewProcess(library.parents[1] / "config.yaml") as review, session(browser, review) as context:
        (shown,) = context.pages
        shown.goto(f"{review.origin}/d/{dataset_key(Layout(library))}/waiting")
        yield shown


def checked(page: "Page") -> list[bool]:
    """Return which images are selected."""
    return [box.is_checked() for box in page.locator("[data-grid] input").all()]


def focused(page: "Page") -> int:
    """Return which image has the focus; -1: none."""
    found: int = page.evaluate("[...document.querySelectorAll('[data-grid] input')].indexOf(document.activeElement)")
    return found


def in_class(library: Path, label: str) -> int:
    """Return how many images are filed into a class."""
    return sum(name.startswith(f"Dataset/{label}/") for name in every_file(library))


def test_arrows_move_the_focus_by_rows_and_columns(page: "Page") -> None:
    """The first arrow enters the grid; up and down keep the column."""
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('[data-grid]')).gridTemplateColumns.split(' ').length"
    )
    assert 2 <= columns < 7
    press_keys(page, "ArrowRight")
    assert focused(page) == 0
    press_keys(page, "ArrowRight")
    assert focused(page) == 1
    press_keys(page, "ArrowDown")
    assert focused(page) == 1 + columns if columns < 6 else focused(page) == 6
    press_keys(page, "ArrowUp", "ArrowLeft", "ArrowLeft")
    assert focused(page) == 0
    press_keys(page, "End", "ArrowRight")
    assert focused(page) == 6


def test_shift_selects_a_range_by_arrows_and_by_clicks(page: "Page") -> None:
    """A range takes the state of its first image, or of the one that was clicked last."""
    press_keys(page, "ArrowRight", "Space", "Shift+ArrowRight", "Shift+ArrowRight")
    assert checked(page) == [False] * 3 + [True] * 4
    press_keys(page, "a")
    assert all(checked(page))
    press_keys(page, "a")
    assert not any(checked(page))
    pictures = page.locator("[data-grid] label")
    pictures.nth(1).click()
    pictures.nth(4).click(modifiers=["Shift"])
    assert checked(page) == [False, True, True, True, True, False, False]
    assert page.locator("[data-selected]").inner_text() == "4 of 7 selected"


def test_enter_files_the_selected_images_as_the_best_guess_and_u_takes_them_back(page: "Page", library: Path) -> None:
    """Only what is selected is filed; what is left stays on the page; undo brings everything back."""
    before = every_file(library)
    press_keys(page, "ArrowRight", "Space", "Enter")
    page.wait_for_url("**effect=*")
    assert in_class(library, "green") == 6
    assert len(checked(page)) == 1
    assert "6" in page.locator("[data-live=effect]").inner_text()
    press_keys(page, "u")
    page.wait_for_function("document.querySelectorAll('[data-grid] input').length === 7")
    assert every_file(library) == before


def test_slash_types_a_class_and_escape_leaves_the_field(page: "Page", library: Path) -> None:
    """In the field letters are letters; Enter files under the name, never under the best guess."""
    press_keys(page, "/")
    page.keyboard.type("n")
    assert page.locator("#label").input_value() == "n"
    press_keys(page, "Escape")
    assert focused(page) == 0
    press_keys(page, "/", "Backspace", "Enter")
    assert "effect" not in page.url
    page.keyboard.type("new class")
    press_keys(page, "Enter")
    page.wait_for_url("**effect=*")
    assert in_class(library, "new class") == 7
    assert in_class(library, "green") == 0


def test_digits_none_and_later_do_what_their_buttons_say(page: "Page", library: Path) -> None:
    """A digit files into the class beside it; s goes on; n sets the images apart."""
    button = page.locator("[data-key='2']").inner_text().split("\n")[-1].strip().removeprefix("2").strip()
    press_keys(page, "2")
    page.wait_for_url("**effect=*")
    assert in_class(library, button) == 7 + (button == "red")
    press_keys(page, "n")
    page.wait_for_function("document.body.innerText.includes('Nothing waits')")
    assert not [name for name in every_file(library) if name.startswith("Review/red/")]


def test_keys_with_modifiers_and_switched_off_keys_do_nothing(page: "Page") -> None:
    """Shortcuts of the browser stay its own, and WCAG 2.1.4 asks for a switch."""
    press_keys(page, "Control+Enter", "Alt+n", "Meta+u")
    assert "effect" not in page.url
    press_keys(page, "?")
    dialog = page.locator("dialog#keys")
    assert dialog.is_visible()
    page.locator("#keys-on").uncheck()
    press_keys(page, "Escape")
    assert not dialog.is_visible()
    press_keys(page, "a")
    assert all(checked(page))
    page.reload()
    press_keys(page, "a")
    assert all(checked(page))


def test_form_is_sent_once(page: "Page", library: Path) -> None:
    """A second press while the answer is on its way sends nothing, and nothing is filed twice."""
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.evaluate(
        "() => { const button = document.querySelector('[data-key=Enter]'); button.click(); button.click(); }"
    )
    page.wait_for_url("**effect=*")
    assert len(sent) == 1
    assert in_class(library, "green") == 7


HIDE = """is_hidden => {
    Object.defineProperty(document, "hidden", { value: is_hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
"""What a browser does when another tab is chosen; without a screen all are visible."""


def test_tabs_that_nobody_sees_keep_no_connection(page: "Page", library: Path) -> None:
    """A browser opens six to a server at most; a tab that is seen again has its texts again."""
    address, context = page.url, page.context
    page.evaluate(HIDE, True)
    for _ in range(7):
        tab = context.new_page()
        tab.goto(address)
        tab.evaluate(HIDE, True)
    (library / "Review" / "red" / "img9.png").unlink()
    page.evaluate(HIDE, False)
    page.get_by_text("9 images wait").first.wait_for()


def test_pages_work_without_javascript(library: Path, browser: "Browser") -> None:
    """Every answer is a button of a form; Enter in the field for a name presses the button beside it."""
    with (
        ReviewProcess(library.parents[1] / "config.yaml") as review,
        session(browser, review, java_script_enabled=False) as context,
    ):
        (page,) = context.pages
        page.goto(f"{review.origin}/d/{dataset_key(Layout(library))}/waiting")
        page.locator("[data-grid] label").first.click()
        page.locator("#label").fill("blue")
        page.locator("#label").press("Enter")
        page.wait_for_url("**effect=*")
        assert in_class(library, "blue") == 6
        assert page.locator(".needs-script").first.is_hidden()
        while not page.get_by_role("link", name="Begin again").count():
            page.get_by_role("link", name="Later").click()
        page.get_by_role("link", name="Begin again").click()
        page.get_by_role("button", name="None of these").click()
        page.wait_for_url("**effect=*")
        assert in_class(library, "blue") == 6
