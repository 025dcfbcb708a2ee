"""What people do on the review page in a real browser beside a running sortd."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import ImageOps
from playwright.sync_api import Browser, BrowserContext, Page, expect

from benchmarks.harness import write_config
from sortd.layout import Layout
from sortd.review.index import dataset_key
from tests.daemon_process import (
    DaemonProcess,
    draw_strangers,
    make_dataset,
    picture,
    running,
    teach,
)
from tests.review.world import (
    ReviewProcess,
    every_file,
    expect_effect,
    file_into,
    load_with_groups,
    needs_browser,
    press_keys,
    session,
)

pytestmark = needs_browser

STRANGERS, KNOWN, ALIKE = 9, 6, 24


@dataclass(frozen=True)
class Site:
    """A review page and the daemon that it asks."""

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
    """A dataset with filed images, strangers that wait and a rejected file, and one whose images are alike."""
    folder = tmp_path_factory.mktemp("work")
    root = folder / "Data"
    fill(make_dataset(root, "plain"))
    alike = make_dataset(root, "live")
    teach(alike, 12)
    for number in range(ALIKE):
        ImageOps.invert(picture("blue", number, patches=40)).save(alike / "Images" / f"alike{number}.png")
    config = write_config(folder, settle_seconds=0.1)
    with running(config) as daemon, ReviewProcess(config) as review:
        daemon.wait_until(lambda: not any(root.glob("*/Images/*")), "the images are moved")
        yield Site(review, daemon, root)


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


def test_work_without_script_answers_undoes_audits_and_retries(browser: Browser, site: Site) -> None:
    """Each act is a form that a browser sends by itself."""
    dataset = site.root / "plain"
    with complete(dataset), session(browser, site.review, java_script_enabled=False) as context:
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


def test_work_live_texts_show_arrivals_and_the_effect_of_an_answer(browser: Browser, site: Site) -> None:
    """A new image is counted, and what the answers made sure is told, while the page stays open."""
    dataset = site.root / "live"
    with session(browser, site.review) as context:
        page = site.open(context, "live")
        waiting = page.locator("[data-live=waiting]")
        expect(waiting).to_have_text(f"{ALIKE} images wait")
        picture("blue", 5, patches=90).save(dataset / "Images" / "new.png")
        expect(waiting).to_have_text(f"{ALIKE + 1} images wait")
        with complete(dataset):
            page.goto(page.url)
            press_keys(page, "a")
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
            expect_effect(page, f"{filed} image{'s are' if filed > 1 else ' is'} back")
            assert len(below(dataset, "Dataset/odd")) == ALIKE - 6
