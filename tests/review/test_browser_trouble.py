"""The review page in a browser when something is wrong: hostile names and images, no daemon, thousands of images."""

import html
import os
import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from benchmarks.harness import write_config
from benchmarks.review import fill_review
from sortd.layout import JOURNAL_FILE, Layout
from sortd.review.index import dataset_key
from sortd.store.history import History
from sortd.store.records import Selection
from tests.bombs import gif, one_bit_png, png_with_text, tiff_in_circles
from tests.daemon_process import draw_strangers, make_dataset, picture, running, teach
from tests.hostile_files import HOSTILE
from tests.review.world import (
    PHONE,
    Client,
    ReviewProcess,
    every_file,
    expect_effect,
    file_into,
    follow,
    load_with_groups,
    needs_browser,
    session,
)

pytestmark = needs_browser

MARKUP = "<img src=x onerror=document.title=1>&amp;{{7*7}}'\""
HOSTILE_NAMES = (
    MARKUP.encode(),
    "\u202egnp.exe\u202c right to left".encode(),
    b"new\nline\ttab \x1b[31m",
    b"not utf-8 \xff\xfe",
    "عربي".encode(),
)
HOSTILE_IMAGES = {
    "bomb.png": one_bit_png(60_000, 60_000),
    "text.png": png_with_text(50_000_000),
    "circles.tif": tiff_in_circles(),
    "canvas.gif": gif(65_000, 65_000),
    "empty.jpg": b"",
    "script.png": b"<script>document.title = 1</script>",
    "drawing.svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1'/>",
}
LARGEST_PAGE = 300_000


def address_of(review: ReviewProcess, dataset: Path) -> str:
    """Return the address of the page of a dataset."""
    return f"{review.origin}/d/{dataset_key(Layout(dataset))}/"


def open_waiting(page: Page, review: ReviewProcess, dataset: Path) -> None:
    """Open what waits in a dataset, once it is grouped."""
    page.goto(address_of(review, dataset) + "waiting")
    load_with_groups(page)


def add_hostile(dataset: Path) -> None:
    """Put classes and images with hostile names, and hostile images, into a dataset."""
    layout = Layout(dataset)
    layout.make()
    for number, name in enumerate(HOSTILE_NAMES):
        folder = os.path.join(os.fsencode(dataset), b"Clases", name)
        os.mkdir(folder)
        for reference in range(4):
            picture("red", 50 * number + reference, patches=90).save(os.path.join(folder, b"%d.png" % reference))
        picture("blue", number).save(os.path.join(os.fsencode(dataset), b"Review", name + b".png"))
        picture("green", number).save(os.path.join(os.fsencode(dataset), b"Rejected", name + b".png"))
    picture("green", 9).save(dataset / "Review" / ("l" * 251 + ".png"))
    for place in ("Review", "Rejected"):
        for image, content in HOSTILE_IMAGES.items():
            (dataset / place / image).write_bytes(content)
        for kind, make in HOSTILE.items():
            make(dataset / place / f"{kind}.png")


def test_trouble_hostile_names_and_images_are_shown_as_text_and_placeholders(browser: Browser, tmp_path: Path) -> None:
    """No name becomes markup or turns what surrounds it, each page works, and an image of any name can be filed."""
    dataset = make_dataset(tmp_path / "Data")
    add_hostile(dataset)
    config = write_config(tmp_path, settle_seconds=0.1)
    said: list[str] = []
    with running(config), ReviewProcess(config) as review, session(browser, review, viewport=PHONE) as context:
        before = every_file(dataset)
        (page,) = context.pages
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text) if "404" not in message.text else None)
        open_waiting(page, review, dataset)
        for image in page.locator(".shown").all():
            image.scroll_into_view_if_needed()
        shown = page.locator(".shown .details").all_inner_texts()
        assert set(HOSTILE_IMAGES) <= set(shown)
        for text in (
            "\\u202egnp.exe\\u202c right to left.png",
            "new\\nline\\ttab \\x1b[31m.png",
            "not utf-8 \\xff\\xfe.png",
        ):
            assert text in shown, shown
        assert MARKUP + ".png" in shown
        placeholders = page.request.get(page.locator('img[alt="bomb.png"]').evaluate("(one) => one.src"))
        assert (placeholders.status, placeholders.headers["content-type"]) == (404, "image/svg+xml")
        for name in ("", "rejected", "runs", "audit", "references", "waiting"):
            page.goto(address_of(review, dataset) + name)
            expect(page.locator("h1").first).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
            assert "sortd" in page.title()
        open_waiting(page, review, dataset)
        assert set(page.locator("button.chip").all_inner_texts()) == {MARKUP, "blue", "green", "red", "عربي"}
        follow(page, page.locator(".shown").filter(has_text="not utf-8").locator(".details").click)
        page.locator("button.chip").filter(has_text=MARKUP).click()
        expect_effect(page, f"1 image filed into {MARKUP}.")
        filed = os.path.join(os.fsencode(dataset), b"Dataset", MARKUP.encode(), b"not utf-8 \xff\xfe.png")
        assert os.path.isfile(filed)
        page.locator(".effect").get_by_role("button", name="Undo").click()
        expect_effect(page, "1 image is back.")
        assert every_file(dataset) == before
    assert said == []


def test_trouble_killed_daemon_or_none_leaves_forms_that_work(browser: Browser, tmp_path: Path) -> None:
    """A form is carried out after a restart, and without any daemon; the state of it is told on the page."""
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset, 12)
    draw_strangers(dataset / "Images", 8)
    config = write_config(tmp_path, settle_seconds=0.1)
    with running(config) as first, ReviewProcess(config) as review, session(browser, review) as context:
        first.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")
        before = sorted(every_file(dataset).values())
        (page,) = context.pages
        open_waiting(page, review, dataset)
        expect(page.locator(".state")).to_have_text("sortd runs")
        for box in range(6):
            page.locator(".shown input").nth(box).uncheck()
        first.stop(signal.SIGKILL)
        expect(page.locator(".state")).to_have_text("sortd does not run")
        with running(config):
            expect(page.locator(".state")).to_have_text("sortd runs")
            file_into(page, "after")
            expect_effect(page, "2 images filed into after.")
        open_waiting(page, review, dataset)
        for box in range(3):
            page.locator(".shown input").nth(box).uncheck()
        file_into(page, "without")
        expect_effect(page, "3 images filed into without.")
        expect_effect(page, "sortd does not run: it will use them when it runs again.")
        for text in ("3 images are back.", "2 images are back."):
            page.locator("[data-key=u]").click()
            expect_effect(page, text)
        assert sorted(every_file(dataset).values()) == before
        assert len(list((dataset / "Review").rglob("*.png"))) == 8


def state_files(folder: Path) -> dict[str, bytes]:
    """Return the files of the state folder, but for those that also change when nobody reads."""
    changing = ("journal.sqlite", "review.", "lock")
    found = every_file(folder / "state")
    return {name: content for name, content in found.items() if not name.rpartition("/")[2].startswith(changing)}


def moves(folder: Path) -> list[tuple[int, str, int | None]]:
    """Return what the journals contain."""
    found = []
    for journal in sorted(folder.glob(f"state/*/{JOURNAL_FILE}")):
        with History.open(journal) as history:
            found += [(one.id, one.destination_path, one.undone_by) for one in history.moves(Selection(limit=None))]
    return found


def crawl(client: Client) -> set[str]:
    """GET every address that a page links to, shows or sends a form to, and return those of pages."""
    pages, seen, waiting = set[str](), set[str](), ["/"]
    while waiting:
        address = waiting.pop()
        if address in seen or "/events" in address:
            continue
        seen.add(address)
        reply = client.get(address)
        assert reply.status < 500, (address, reply.text)
        if reply.status == 303:
            waiting.append(reply.headers["location"])
        elif reply.headers["content-type"].startswith("text/html"):
            if reply.status == 200:
                pages.add(address)
                assert len(reply.content) < LARGEST_PAGE, address
            linked = re.findall(r'(?:href|src|action)="([^"]*)"', reply.text)
            waiting += [html.unescape(one) for one in linked if one.startswith("/")]
    return pages


def test_trouble_no_get_changes_anything(tmp_path: Path) -> None:
    """All addresses of all pages, forms included, are fetched; files, journals, samples and state stay as they are."""
    make_dataset(tmp_path / "Data", "Others")
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset, 12)
    draw_strangers(dataset / "Images", 8)
    for number in range(4):
        picture("red", number).save(dataset / "Images" / f"known{number}.png")
    (dataset / "Images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    config = write_config(tmp_path, settle_seconds=0.1)
    with running(config) as daemon:
        daemon.wait_until(lambda: not any(tmp_path.glob("Data/*/Images/*")), "the images are moved")
    with ReviewProcess(config) as review:
        client = Client(review)
        key = dataset_key(Layout(tmp_path / "Data" / "Colours"))
        token = client.token(f"/d/{key}/audit")
        assert client.post(f"/d/{key}/draw", {"token": token}).status == 303
        before = (every_file(tmp_path / "Data"), moves(tmp_path), state_files(tmp_path))
        assert any(name.endswith("audit.json") for name in before[2])
        pages = crawl(client)
        assert len(pages) > 40
        assert {f"/d/{key}/{name}" for name in ("", "waiting", "audit", "rejected", "runs", "references")} <= pages
        assert (every_file(tmp_path / "Data"), moves(tmp_path), state_files(tmp_path)) == before


@pytest.mark.parametrize(
    "count", [pytest.param(1_000, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.long)]
)
def test_trouble_many_waiting_images_are_paged_and_pages_stay_small(
    browser: Browser, tmp_path: Path, count: int
) -> None:
    """Each page of the largest batch can be opened, and none is large."""
    config = fill_review(tmp_path, count)
    dataset = tmp_path / "Data" / "Colours"
    with ReviewProcess(config) as review, session(browser, review) as context:
        (page,) = context.pages
        open_waiting(page, review, dataset)
        expect(page.locator("[data-live=waiting]")).to_have_text(re.compile(r"[0-9]{4,5} images wait"))
        follow(page, page.locator("main form .pager").get_by_role("link", name="Next").click)
        expect(page.locator(".shown img").first).to_have_js_property("complete", True)
        (pages,) = re.findall("page 2 of ([0-9]+)", page.locator("main form .pager").inner_text())
        address, client = page.url.removeprefix(review.origin).partition("page=")[0], Client(review)
        replies = [client.get(f"{address}page={number}") for number in range(1, int(pages) + 1)]
        assert {reply.status for reply in replies} == {200}
        assert max(len(reply.content) for reply in replies) < LARGEST_PAGE


def test_trouble_daemon_killed_with_a_request_moves_each_image_once(browser: Browser, tmp_path: Path) -> None:
    """The review page notices the end of the daemon, and does what was asked itself; a later daemon takes it back."""
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset, 12)
    draw_strangers(dataset / "Images", 6)
    config = write_config(tmp_path, settle_seconds=0.1)
    with running(config) as daemon, ReviewProcess(config) as review, session(browser, review) as context:
        daemon.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")
        before = sorted(every_file(dataset).values())
        (page,) = context.pages
        open_waiting(page, review, dataset)
        daemon.send(signal.SIGSTOP)
        page.get_by_placeholder("class", exact=False).fill("odd")
        page.get_by_role("button", name="File there").click(no_wait_after=True)
        daemon.wait_until(lambda: any(tmp_path.glob("state/requests/*")), "the request is written")
        daemon.stop(signal.SIGKILL)
        expect_effect(page, "6 images filed into odd.")
        with running(config):
            page.reload()
            expect(page.locator(".state")).to_have_text("sortd runs")
            page.locator("[data-key=u]").click()
            expect_effect(page, "6 images are back.")
        assert sorted(every_file(dataset).values()) == before
