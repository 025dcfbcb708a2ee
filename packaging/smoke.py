"""See whether an installed sortd works: ``python smoke.py``, with the interpreter of the environment, anywhere.

Runs the installed program in an empty folder: its help, and ``once`` on drawn images with the packaged weights.
Then looks for the files that are installed beside the modules.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

COLOURS = {"red": (200, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 200)}
CONFIG = "root: .\nmodel: packaged\nmode: max\nabstain: off\nsettle_seconds: 0.1\nstate_dir: state\ncache_dir: cache\n"
PACKAGED = ("shipped/config.example.yaml", "shipped/systemd/sortd.service", "model/model.safetensors", "py.typed")


def draw(root: Path) -> None:
    """Draw a dataset of three plain colours, with one image of each in Images/."""
    for label, (red, green, blue) in COLOURS.items():
        clase, inbox = root / "Colours" / "Clases" / label, root / "Colours" / "Images"
        clase.mkdir(parents=True)
        inbox.mkdir(exist_ok=True)
        for shade in range(4):
            Image.new("RGB", (64, 64), (red - shade, green, blue)).save(clase / f"{shade}.png")
        Image.new("RGB", (64, 64), (red, green - 5, blue)).save(inbox / f"{label}.png")


def main() -> None:
    """Run the installed program and end with an error if something is missing."""
    sortd = Path(sys.executable).parent / "sortd"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root)
        (root / "config.yaml").write_text(CONFIG)
        helped = subprocess.run([sortd, "--help"], cwd=root, capture_output=True, text=True, check=True)  # noqa: S603
        assert "once" in helped.stdout
        subprocess.run([sortd, "once"], cwd=root, check=True)  # noqa: S603
        filed = sorted(
            path.relative_to(root / "Colours" / "Dataset").as_posix() for path in root.rglob("Dataset/*/*.png")
        )
    assert filed == sorted(f"{label}/{label}.png" for label in COLOURS), filed
    spec = importlib.util.find_spec("sortd")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not installed in {sys.prefix}"
    missing = [name for name in PACKAGED if not (package / name).is_file()]
    assert not missing, missing
    pages = len(list(Path(sys.prefix, "share", "man", "man1").glob("*.1")))
    print(f"{package}: help, three images filed, {len(PACKAGED)} packaged files, {pages} man pages")


if __name__ == "__main__":
    main()
