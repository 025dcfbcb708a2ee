"""The script of the pages in a real browser: selection and keys, forms that are sent once, layout and accessibility."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sortd.layout import Layout
from sortd.review.index import dataset_key
from tests.command_line import write_config
from tests.daemon_process import make_dataset
from tests.filed_images import file_images
from tests.review.test_pages import send_to_review
from tests.review.world import (
    PHONE,
    ReviewProcess,
    every_file,
    expect_effect,
    file_into,
    follow,
    needs_browser,
    press_keys,
    session,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = needs_browser

SMALL = """() => [...document.querySelectorAll("a, button, summary, input:not([type=hidden])")]
    .filter((one) => one.checkVisibility() && !one.closest("p, td, dialog, .skip"))
    .map((one) => [one.closest("label") ?? one, one])
    .filter(([area]) => { const box = area.getBoundingClientRect(); return box.width < 43.5 || box.height < 43.5; })
    .map(([, one]) => one.outerHTML.slice(0, 120))"""
"""The targets that a finger misses; links in a text and in a table may be smaller (WCAG 2.2, 2.5.8)."""


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewProcess]:
    """``sortd review``; each test has a library of its own below its root."""
    with ReviewProcess(write_config(tmp_path_factory.mktemp("keys"))) as process:
        yield process


@pytest.fixture
def library(review: ReviewProcess, tmp_path: Path) -> Path:
    """A library with ten waiting images in two batches, and a filed and a rejected one."""
    folder = review.config.parent
    dataset = make_dataset(folder / "Data", tmp_path.name)
    file_images(dataset, folder / "state", {"one.png": "red", "torn.png": "rejected"})
    names = {f"img{number}.png".encode(): "green" if number < 7 else "red" for number in range(10)}
    send_to_review(dataset, folder / "state", dict(names))
    return dataset


@pytest.fixture
def page(review: ReviewProcess, library: Path, browser: "Browser") -> "Iterator[Page]":
    """The first batch in a browser: seven images."""
    with session(browser, review) as context:
        yield open_waiting(context, review, library)


def open_waiting(context: "BrowserContext", review: ReviewProcess, library: Path) -> "Page":
    """Open the page of what waits."""
    (page,) = context.pages
    page.goto(f"{review.origin}/d/{dataset_key(Layout(library))}/waiting")
    return page


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
    page.keyboard.type("nNsu1a?/")
    assert page.locator("#label").input_value() == "nNsu1a?/"
    completed = page.locator("#classes option").evaluate_all("all => all.map((one) => one.value)")
    assert completed == ["blue", "green", "red"]
    press_keys(page, "Escape")
    assert focused(page) == 0
    assert all(checked(page))
    press_keys(page, "/", "Control+a", "Backspace", "Enter")
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


def test_keys_with_modifiers_and_switched_off_keys_do_nothing(page: "Page", library: Path) -> None:
    """Shortcuts of the browser stay its own, and WCAG 2.1.4 asks for a switch."""
    before, sent = every_file(library), list[str]()
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    press_keys(page, "Control+Enter", "Alt+n", "Meta+u")
    press_keys(page, "?")
    dialog = page.locator("dialog#keys")
    dialog.wait_for(state="visible")
    press_keys(page, "n")
    page.locator("#keys-on").uncheck()
    press_keys(page, "Escape")
    dialog.wait_for(state="hidden")
    press_keys(page, "a")
    assert all(checked(page))
    page.reload()
    press_keys(page, "a")
    assert all(checked(page))
    assert (every_file(library), sent) == (before, [])


def test_form_is_sent_once(page: "Page", library: Path) -> None:
    """Two fast clicks send one form, and no way back sends it again; that of an old page moves only what is left."""
    old = page.context.new_page()
    old.goto(page.url)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.locator(".shown input").first.uncheck()
    page.locator("[data-key=Enter]").evaluate("(one) => { one.click(); one.click(); }")
    expect_effect(page, "6 images filed into green.")
    page.go_back()
    page.go_forward()
    page.reload()
    assert len(sent) == 1
    file_into(old, "blue")
    expect_effect(old, "6 changed or were moved since they were shown: look again")
    assert (in_class(library, "green"), in_class(library, "blue")) == (6, 1)


def test_keys_file_set_apart_and_undo_to_any_depth(page: "Page", library: Path) -> None:
    """A typed class, a digit, n, N, s, and three acts taken back one after the other."""
    before, address, press = every_file(library), page.url, partial(press_keys, page)
    press(*3 * ("ArrowRight", "Space"), "/")
    page.keyboard.type("blue")
    press("Enter")
    expect_effect(page, "4 images filed into blue.")
    page.goto(address)
    press("s")
    page.wait_for_url("**after=**")
    page.goto(address)
    press("ArrowRight", "Space", "n")
    expect_effect(page, "2 images set apart as none of the classes.")
    page.goto(address)
    press("1")
    expect_effect(page, "1 image filed into blue.")
    for text in ("1 image is back.", "2 images are back.", "4 images are back."):
        press("u")
        expect_effect(page, text)
    page.goto(address)
    press("N")
    expect_effect(page, "7 images set apart as none of the classes.")
    press("u")
    expect_effect(page, "7 images are back.")
    assert every_file(library) == before


def test_touch_on_a_phone_deselects_files_and_undoes(review: ReviewProcess, library: Path, browser: "Browser") -> None:
    """A tap on a picture deselects it."""
    before = every_file(library)
    with session(browser, review, viewport=PHONE, has_touch=True, is_mobile=True) as context:
        page = open_waiting(context, review, library)
        page.locator(".shown label").nth(2).tap()
        page.get_by_text("File as").first.tap()
        expect_effect(page, "6 images filed into green.")
        assert in_class(library, "green") == 6
        page.locator(".effect button").get_by_text("Undo").tap()
        expect_effect(page, "6 images are back.")
    assert every_file(library) == before


def test_two_people_move_nothing_twice(page: "Page", review: ReviewProcess, library: Path, browser: "Browser") -> None:
    """The second answer to a batch is refused with the reason; an undo takes back only acts of one's own."""
    with session(browser, review) as context:
        other = open_waiting(context, review, library)
        for box in range(3):
            page.locator(".shown input").nth(box).uncheck()
        file_into(page, "mine")
        expect_effect(page, "4 images filed into mine.")
        file_into(other, "theirs")
        expect_effect(other, "4 changed or were moved since they were shown: look again")
        expect_effect(other, "3 images filed into theirs.")
        page.get_by_role("button", name="Undo").first.click()
        expect_effect(page, "4 images are back.")
        page.get_by_role("button", name="Undo").last.click()
        expect_effect(page, "There is nothing to undo.")
    assert (in_class(library, "mine"), in_class(library, "theirs")) == (0, 3)


def test_pages_are_spanish_for_who_reads_spanish(review: ReviewProcess, library: Path, browser: "Browser") -> None:
    """The language is that of the browser."""
    with session(browser, review, locale="es-ES") as context:
        page = open_waiting(context, review, library)
        assert page.locator("html").get_attribute("lang") == "es"
        assert "10 imágenes" in page.locator("[data-live=waiting]").inner_text()
        assert "Deshacer" in page.locator("button[data-key=u]").inner_text()


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


def test_pages_work_without_javascript(review: ReviewProcess, library: Path, browser: "Browser") -> None:
    """Every answer is a button of a form; Enter in the field for a name presses the button beside it."""
    with session(browser, review, java_script_enabled=False) as context:
        page = open_waiting(context, review, library)
        page.locator("[data-grid] label").first.click()
        page.locator("#label").fill("blue")
        follow(page, partial(page.locator("#label").press, "Enter"))
        assert in_class(library, "blue") == 6
        assert page.locator(".needs-script").first.is_hidden()
        while not page.get_by_role("link", name="Begin again").count():
            follow(page, page.get_by_role("link", name="Later").click)
        follow(page, page.get_by_role("link", name="Begin again").click)
        follow(page, page.get_by_role("button", name="None of these").click)
        assert in_class(library, "blue") == 6
        assert in_class(library, "_none")
