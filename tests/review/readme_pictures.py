"""Draw the pictures of the README and of docs/review.md: the review page of the sample, on a desktop and on a phone.

python -m tests.review.readme_pictures
"""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.harness import write_config
from tests.daemon_process import DaemonProcess
from tests.review.world import PHONE, ROOT, ReviewProcess, chromium, copy_sample, load_with_groups, session

FOLDER = ROOT / "docs" / "images"
DESKTOP = {"width": 1280, "height": 860}
QUALITY = 80


def main() -> None:
    """Let sortd file the sample, and take the pictures of what waits."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = copy_sample(folder)
        subprocess.run([sys.executable, "Data/draw.py", "incoming"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        config = write_config(folder, model="packaged")
        with DaemonProcess(config, program="sortd") as daemon, ReviewProcess(config) as review, chromium() as browser:
            daemon.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")
            for name, viewport, scheme in (("review", DESKTOP, "light"), ("review-phone", PHONE, "dark")):
                options = {"viewport": viewport, "color_scheme": scheme, "is_mobile": viewport is PHONE}
                with session(browser, review, **options) as opened:
                    (page,) = opened.pages
                    page.goto(f"{page.url}waiting")
                    load_with_groups(page)
                    page.wait_for_load_state("load")
                    shot = Image.open(io.BytesIO(page.screenshot()))
                    shot.convert("RGB").save(FOLDER / f"{name}.webp", quality=QUALITY, method=6)
            daemon.stop()


if __name__ == "__main__":
    main()
