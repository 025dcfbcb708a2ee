"""The documentation as a site: it is built as `make docs` does, its links hold, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import commands

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site; each warning, of a link that leads nowhere say, is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_a_page_for_each_document(site: Path) -> None:
    """Each file of docs/ and each made page is in the navigation of the first page."""
    first = (site / "index.html").read_text(encoding="utf-8")
    documents = [file.stem for file in (REPOSITORY / "docs").glob("*.md")]
    for name in [*documents, "inicio", "commands", "configuration", "changelog", "licence"]:
        assert (site / name / "index.html").is_file()
        assert f'href="{name}/"' in first


def test_site_reference_describes_every_command(site: Path) -> None:
    """The page of the commands has a section for each."""
    page = (site / "commands" / "index.html").read_text(encoding="utf-8")
    assert {name for name in commands() if f'id="sortd-{name}"' not in page} == set()


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, style sheets, fonts and pictures are files of the site."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]* rel="(?:stylesheet|icon|preconnect)"[^>]*>', text
        )
        assert [address for address in loaded if address.startswith(("http", "//"))] == [], page
        sheets = re.findall(r"<link[^>]*>", text)
        assert [one for one in sheets if 'href="http' in one and "canonical" not in one] == [], page
