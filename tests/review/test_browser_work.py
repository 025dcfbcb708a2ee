"""What people do on the review page in a real browser: with keys, by touch, without JavaScript, two at once."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import ImageOps
from playwright.sync_api import Browser, BrowserContext, Page, expect

from benchmarks.harness import write_config
from sortd.layout import Layout
from sortd.review.index import dataset_key
from tests.daemon_process import (
    PATIENCE_SECONDS,
    DaemonProcess,
    draw_strangers,
    make_dataset,
    picture,
    running,
    teach,
)
from tests.review.world import (
    PHONE,
    ReviewProcess,
    chromium,
    every_file,
    load_with_groups,
    needs_browser,
    press_keys,
    session,
)

pytestmark = needs_browser

STRANGERS, KNOWN, ALIKE = 9, 6, 24
NAMES = ("plain", "phone", "keys", "twice", "two", "spanish")
"""Datasets of the tests, so that one daemon and one review page serve all of them."""


@dataclass(frozen=True)
class Site:
    """A browser, a review page and the daemon that it asks."""

    browser: Browser
    review: ReviewProcess
    daemon: DaemonProcess
    root: Path

    def open(self, context: BrowserContext, name: str, address: str = "waiting") -> Page:
        """Open a page of a dataset, once its images are grouped."""
        (page, *_) = context.pages
        page.goto(f"{self.review.origin}/d/{dataset_key(Layout(self.root / name))}/{address}")
        load_with_groups(page)
        return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Datasets with filed images, with strangers that wait, and with a rejected file each."""
    folder = tmp_path_factory.mktemp("work")
    root = folder / "Data"
    for name in NAMES:
        fill(make_dataset(root, name))
    alike = make_dataset(root, "live")
    teach(alike, 12)
    for number in range(ALIKE):
        ImageOps.invert(picture("blue", number, patches=40)).save(alike / "Images" / f"alike{number}.png")
    config = write_config(folder, settle_seconds=0.1)
    expect.set_options(1000 * PATIENCE_SECONDS)
    with running(config) as daemon, ReviewProcess(config) as review, chromium() as browser:
        daemon.wait_until(lambda: not any(root.glob("*/Images/*")), "the images are moved")
        yield Site(browser, review, daemon, root)
    expect.set_options(None)


def fill(dataset: Path) -> None:
    """Give a dataset references, and images that are filed, wait, and are rejected."""
    teach(dataset, 12)
    draw_strangers(dataset / "Images", STRANGERS)
    for number in range(KNOWN):
        picture(("red", "green")[number % 2], number).save(dataset / "Images" / f"known{number}.png")
    (dataset / "Images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def contents(dataset: Path) -> Counter[bytes]:
    """Return the contents of all files of a dataset, but for the reasons that sortd writes."""
    return Counter(content for name, content in every_file(dataset).items() if not name.endswith(".reason.json"))


@contextmanager
def complete(dataset: Path) -> Iterator[None]:
    """Check that each file is still there, with its content, and no other."""
    before = contents(dataset)
    yield
    assert contents(dataset) == before


def below(dataset: Path, folder: str) -> set[str]:
    """Return the names of the files in a folder of a dataset."""
    return {path.name for path in (dataset / folder).rglob("*") if path.is_file()}


def expect_effect(page: Page, text: str) -> None:
    """Wait until a page says what an act did."""
    expect(page.locator(".effect")).to_contain_text(text)


def file_into(page: Page, label: str) -> None:
    """File the selected images into a class whose name is typed."""
    page.get_by_placeholder("class", exact=False).fill(label)
    page.get_by_role("button", name="File there").click()


def test_work_without_script_answers_undoes_audits_and_retries(site: Site) -> None:
    """Each act is a form that a browser sends by itself."""
    dataset = site.root / "plain"
    with complete(dataset), session(site.browser, site.review, java_script_enabled=False) as context:
        page = site.open(context, "plain")
        waiting = below(dataset, "Review")
        assert len(waiting) == STRANGERS
        page.locator(".shown input").nth(0).uncheck()
        page.locator(".shown input").nth(1).uncheck()
        file_into(page, "odd")
        expect_effect(page, f"{STRANGERS - 2} images filed into odd.")
        assert len(below(dataset, "Dataset/odd")) == STRANGERS - 2
        page.locator(".effect button").get_by_text("Undo").click()
        expect_effect(page, f"{STRANGERS - 2} images are back.")
        assert below(dataset, "Review") == waiting

        page.get_by_role("link", name="Audit").click()
        page.get_by_role("button", name="Draw a sample").click()
        page.locator("input[name=wrong]").first.check()
        page.get_by_role("button", name="Record the answers").click()
        expect_effect(page, f"{KNOWN - 1} of {KNOWN} images of the sample are right.")
        page.locator("input[name=image]").check()
        file_into(page, "blue")
        expect_effect(page, "1 image filed into blue.")

        page.get_by_role("link", name="Rejected").click()
        page.get_by_label("broken.png").check()
        page.get_by_role("button", name="Try again").click()
        expect_effect(page, "1 image is tried again.")
        site.daemon.wait_until(lambda: below(dataset, "Rejected") >= {"broken.png"}, "it is rejected again")

        page.get_by_role("link", name="Runs").click()
        page.get_by_text("Undo this run").click()
        page.get_by_role("button", name="Take all back").click()
        expect_effect(page, "images are back.")
        assert not below(dataset, "Review")
        assert {f"stranger{number:03}.png" for number in range(STRANGERS)} <= below(dataset, "Images")


def test_work_by_touch_on_a_phone_deselects_files_and_undoes(site: Site) -> None:
    """A tap on a picture deselects it."""
    dataset = site.root / "phone"
    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    with complete(dataset), session(site.browser, site.review, **options) as context:
        page = site.open(context, "phone")
        page.locator(".shown label").nth(2).tap()
        page.get_by_text("File as").first.tap()
        expect_effect(page, f"{STRANGERS - 1} images filed into")
        assert len(below(dataset, "Review")) == 1
        page.locator(".effect button").get_by_text("Undo").tap()
        expect_effect(page, f"{STRANGERS - 1} images are back.")
        assert len(below(dataset, "Review")) == STRANGERS


def test_work_keys_select_ranges_and_not_in_the_field(site: Site) -> None:
    """Ranges by shift and click or arrow; the help opens; in the field for a name each key is a letter."""
    dataset = site.root / "keys"
    with complete(dataset), session(site.browser, site.review) as context:
        page = site.open(context, "keys")
        press, checked = partial(press_keys, page), page.locator(".shown input:checked")
        press("a")
        expect(checked).to_have_count(0)
        page.locator(".shown label").nth(0).click()
        page.locator(".shown label").nth(3).click(modifiers=["Shift"])
        expect(checked).to_have_count(4)
        press("ArrowRight")
        press("Space")
        press("Shift+ArrowRight")
        expect(checked).to_have_count(6)
        expect(page.locator("[data-selected]")).to_have_text(f"6 of {STRANGERS} selected")
        press("?")
        expect(page.locator("dialog")).to_be_visible()
        press("n")
        press("Escape")
        expect(page.locator("dialog")).not_to_be_visible()
        press("/")
        page.keyboard.type("nNsu1a?/")
        expect(page.locator("#label")).to_have_value("nNsu1a?/")
        completed = page.locator("#classes option").evaluate_all("all => all.map((one) => one.value)")
        assert completed == ["blue", "green", "red"]
        press("Escape")
        expect(page.locator("#label")).not_to_be_focused()
        expect(checked).to_have_count(6)
        assert len(below(dataset, "Review")) == STRANGERS


def test_work_keys_file_set_apart_and_undo_to_any_depth(site: Site) -> None:
    """A typed class, a digit, n, N, s, and three acts taken back one after the other."""
    dataset = site.root / "keys"
    with complete(dataset), session(site.browser, site.review) as context:
        page = site.open(context, "keys")
        press = partial(press_keys, page)
        for _ in range(3):
            press("ArrowRight")
            press("Space")
        press("/")
        page.keyboard.type("blue")
        press("Enter")
        expect_effect(page, f"{STRANGERS - 3} images filed into blue.")
        site.open(context, "keys")
        press("s")
        page.wait_for_url("**after=**")
        site.open(context, "keys")
        press("Space")
        press("ArrowRight")
        press("Space")
        press("n")
        expect_effect(page, "2 images set apart as none of the classes.")
        site.open(context, "keys")
        press("1")
        expect_effect(page, "1 image filed into blue.")
        for text in ("1 image is back.", "2 images are back.", f"{STRANGERS - 3} images are back."):
            press("u")
            expect_effect(page, text)
        assert len(below(dataset, "Review")) == STRANGERS
        site.open(context, "keys")
        press("N")
        expect_effect(page, f"{STRANGERS} images set apart as none of the classes.")
        press("u")
        expect_effect(page, f"{STRANGERS} images are back.")


def test_work_same_form_twice_files_once(site: Site) -> None:
    """Two fast clicks send one form; the form of an old page moves nothing, and says why."""
    dataset = site.root / "twice"
    with complete(dataset), session(site.browser, site.review) as context:
        page = site.open(context, "twice")
        old = context.new_page()
        old.goto(page.url)
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
        page.locator(".shown input").first.uncheck()
        page.locator("button[value^='=']").first.evaluate("(one) => { one.click(); one.click(); }")
        expect_effect(page, f"{STRANGERS - 1} images filed into")
        assert len(sent) == 1
        page.go_back()
        page.go_forward()
        page.reload()
        assert len(sent) == 1
        (left,) = below(dataset, "Review")
        file_into(old, "blue")
        expect_effect(old, f"{STRANGERS - 1} changed or were moved since they were shown: look again")
        assert below(dataset, "Dataset/blue") == {left}


def test_work_of_two_people_moves_nothing_twice(site: Site) -> None:
    """The second answer to a batch is refused with the reason; an undo takes back only acts of one's own."""
    dataset = site.root / "two"
    with (
        complete(dataset),
        session(site.browser, site.review) as context,
        session(site.browser, site.review) as other_context,
    ):
        page, other = site.open(context, "two"), site.open(other_context, "two")
        for box in range(3):
            page.locator(".shown input").nth(box).uncheck()
        file_into(page, "mine")
        expect_effect(page, f"{STRANGERS - 3} images filed into mine.")
        file_into(other, "theirs")
        expect_effect(other, f"{STRANGERS - 3} changed or were moved since they were shown: look again")
        expect_effect(other, "3 images filed into theirs.")
        page.get_by_role("button", name="Undo").first.click()
        expect_effect(page, f"{STRANGERS - 3} images are back.")
        page.get_by_role("button", name="Undo").last.click()
        expect_effect(page, "There is nothing to undo.")
        assert len(below(dataset, "Dataset/theirs")) == 3
        assert len(below(dataset, "Review")) == STRANGERS - 3


def test_work_live_texts_show_arrivals_and_the_effect_of_an_answer(site: Site) -> None:
    """A new image is counted, and what the answers made sure is told, while the page stays open."""
    dataset = site.root / "live"
    with session(site.browser, site.review) as context:
        page = site.open(context, "live")
        waiting = page.locator("[data-live=waiting]")
        expect(waiting).to_have_text(f"{ALIKE} images wait")
        picture("blue", 5, patches=90).save(dataset / "Images" / "new.png")
        expect(waiting).to_have_text(f"{ALIKE + 1} images wait")
        with complete(dataset):
            page.goto(page.url)
            press = partial(press_keys, page)
            press("a")
            for number in range(ALIKE - 6):
                page.get_by_role("checkbox", name=f"alike{number}.png", exact=True).check()
            file_into(page, "odd")
            expect(page.locator(".effect")).to_contain_text(re.compile("made [0-9]+ waiting images? sure"))
            filed = len(below(dataset, "Dataset/odd")) - (ALIKE - 6)
            assert filed
            left = 7 - filed
            expect(page.locator("[data-live=waiting]")).to_have_text(re.compile(f"{left} images? waits?"))
            page.reload()
            page.get_by_role("button", name="back to Review").click()
            expect_effect(page, f"{filed} image")
            assert len(below(dataset, "Dataset/odd")) == ALIKE - 6


def test_work_pages_are_spanish_for_who_reads_spanish(site: Site) -> None:
    """The language is that of the browser."""
    with session(site.browser, site.review, locale="es-ES") as context:
        page = site.open(context, "spanish")
        expect(page.locator("html")).to_have_attribute("lang", "es")
        expect(page.locator("[data-live=waiting]")).to_have_text(re.compile(f"{STRANGERS} imágenes"))
        expect(page.locator("button[data-key=u]")).to_contain_text("Deshacer")
