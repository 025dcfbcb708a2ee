"""Every page under the rules of axe-core: light and dark, on a desktop and on a phone."""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from benchmarks.harness import write_config
from sortd.commands.evaluation import evaluation_page
from sortd.commands.explain import explain_page
from tests.commands.test_evaluation import NOW, explained, facts_of
from tests.daemon_process import PATIENCE_SECONDS, draw_strangers, make_dataset, picture, running, teach
from tests.review.world import PHONE, ReviewProcess, follow, load_with_groups, load_without, needs_browser, session

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

pytestmark = needs_browser

DESKTOP: "ViewportSize" = {"width": 1280, "height": 900}
STANDARDS = "['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']"
CONTRAST = "{type: 'rule', values: ['color-contrast']}"
"""The only rule of which the answer depends on the colours."""
SMALLEST_TARGET, PHONE_BUTTON = 24, 44
SMALL_TARGETS = """
    const [smallest, button] = %s;
    const found = [];
    for (const one of document.querySelectorAll("a, button, input:not([type=hidden]), summary, select")) {
      const box = (one.matches(".shown input, .check input") ? one.closest("label") : one).getBoundingClientRect();
      if (!one.checkVisibility() || box.right < 0) continue;
      const least = one.matches("button, .button, summary, .top a") ? Math.max(smallest, button) : smallest;
      if (box.width < least - 0.1 || box.height < least - 0.1) {
        found.push(`${one.outerHTML.slice(0, 90)}: ${box.width} x ${box.height}`);
      }
    }
    found
"""


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewProcess]:
    """Two datasets: one with a proposed class, a group, filed images, a rejected file; in the other nothing waits."""
    folder = tmp_path_factory.mktemp("accessible")
    dataset = make_dataset(folder / "Data")
    make_dataset(folder / "Data", "Empty")
    teach(dataset)
    picture("red", 1, patches=40).save(dataset / "Clases" / "blue" / "misplaced.png")
    images = dataset / "Images"
    draw_strangers(images, 7)
    for number in range(3):
        Image.new("RGB", (400, 120), (0, 0, number)).save(images / f"black {number}.png")
    for number in range(6):
        picture(("red", "green")[number % 2], number).save(images / f"known{number}.png")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    config = write_config(folder, settle_seconds=0.1)
    with running(config) as daemon, ReviewProcess(config) as process:
        daemon.wait_until(lambda: not any(images.iterdir()), "the images are moved")
        yield process


def open_page(page: "Page", name: str) -> None:
    """Open a page by its link in the line of all pages."""
    follow(page, page.locator("nav").get_by_text(name).click)


def open_batch(page: "Page", wanted: str) -> None:
    """Open the batch of which the heading or the badge says this; wait until there are groups."""
    open_page(page, "Waiting")
    load_with_groups(page)
    if not page.locator(".title").get_by_text(wanted).count():
        follow(page, page.locator(".batch").get_by_text(wanted).first.click)


def draw_sample(page: "Page") -> None:
    """Open the audit, and draw a sample unless one is open."""
    open_page(page, "Audit")
    if (draw := page.get_by_text("Draw a sample")).count():
        follow(page, draw.click)


def open_references(page: "Page") -> None:
    """Open the references that look misplaced, once they were examined."""
    open_page(page, "References")
    load_without(page, "being examined")


def open_image(page: "Page") -> None:
    """Open the page of an image that waits."""
    open_page(page, "Waiting")
    follow(page, page.locator(".shown .details").first.click)


def open_help(page: "Page") -> None:
    """Open the help for the keys."""
    open_page(page, "Waiting")
    page.locator("footer button").click()


PAGES: dict[str, Callable[["Page"], Any]] = {
    "overview": lambda _: None,
    "new class": lambda page: open_batch(page, "new class?"),
    "group": lambda page: open_batch(page, "3 images"),
    "image": open_image,
    "help": open_help,
    "audit": draw_sample,
    "rejected": lambda page: open_page(page, "Rejected"),
    "runs": lambda page: open_page(page, "Runs"),
    "references": open_references,
    "no such page": lambda page: page.goto(page.url + "nothing"),
    "nothing waits": lambda _: None,
    "home": lambda page: follow(page, page.locator(".home").click),
}


def evaluated(page: "Page", script: str) -> Any:
    """Return the value of a script, which the content security policy of the page does not concern."""
    developer = page.context.new_cdp_session(page)
    found = developer.send("Runtime.evaluate", {"expression": script, "awaitPromise": True, "returnByValue": True})
    assert "exceptionDetails" not in found, found
    developer.detach()
    return found["result"].get("value")


def findings(page: "Page", rules: str) -> list[str]:
    """Return what axe-core finds on a page by its rules of these tags, or of these names."""
    evaluated(page, files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8") + "; 0")
    report = json.loads(evaluated(page, f"axe.run(document, {{runOnly: {rules}}}).then(JSON.stringify)"))
    assert report["passes"]
    return [
        f"{one['impact']} {one['id']}: {node['html']}: {node['failureSummary']}"
        for one in report["violations"]
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_break_no_rule_of_accessibility(browser: "Browser", review: ReviewProcess, size: "ViewportSize") -> None:
    """No finding of axe-core, no horizontal scroll, and no target that is too small for a finger or a pointer."""
    found: dict[str, list[str]] = {}
    is_phone = size is PHONE
    with session(browser, review, viewport=size, has_touch=is_phone, is_mobile=is_phone) as opened:
        (page,) = opened.pages
        colours, empty = page.locator("a.big").evaluate_all("all => all.map((one) => one.href)")
        for name, go in PAGES.items():
            page.goto(empty + "waiting" if name == "nothing waits" else colours)
            go(page)
            page.emulate_media(color_scheme="light")
            found[name] = findings(page, STANDARDS)
            page.emulate_media(color_scheme="dark")
            found[name] += [f"dark: {one}" for one in findings(page, CONTRAST)]
            found[name] += evaluated(page, SMALL_TARGETS % [SMALLEST_TARGET, PHONE_BUTTON if is_phone else 0])
            width = evaluated(page, "document.documentElement.scrollWidth")
            found[name] += [f"{width} pixels wide"] if width > size["width"] else []
    assert {name: one for name, one in found.items() if one} == {}


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_reports_break_no_rule_of_accessibility(browser: "Browser", size: "ViewportSize", tmp_path: Path) -> None:
    """No finding of axe-core; only tables and plots scroll, and the keyboard reaches those that do."""
    reports = {
        "eval": evaluation_page({"Noise": facts_of(tmp_path, classes=16)}, now=NOW),
        "explain": explain_page(explained(make_dataset(tmp_path / "Data")), now=NOW),
    }
    found: dict[str, list[str]] = {}
    context = browser.new_context(viewport=size)
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    page = context.new_page()
    for name, report in reports.items():
        page.set_content(report)
        page.emulate_media(color_scheme="light")
        found[name] = findings(page, STANDARDS)
        page.emulate_media(color_scheme="dark")
        found[name] += [f"dark: {one}" for one in findings(page, CONTRAST)]
        width = evaluated(page, "document.documentElement.scrollWidth")
        found[name] += [f"{width} pixels wide"] if width > size["width"] else []
        found[name] += evaluated(
            page, "[...document.querySelectorAll('table')].filter((one) => !one.closest('.scroll')).map(String)"
        )
    context.close()
    assert {name: one for name, one in found.items() if one} == {}
