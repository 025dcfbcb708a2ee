"""Hatchling calls this for a wheel, which then has the man pages and the shell completions below ``share/``."""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SharedFiles(BuildHookInterface[Any]):
    """Generates the files of ``generate.py`` for a wheel; an editable install has none, since they would go stale."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate them, and name them with their places."""
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        out = Path(self._folder.name)
        runpy.run_path(str(Path(__file__).with_name("generate.py")))["generate"](out)
        build_data["shared_data"] |= {str(page): f"share/man/man1/{page.name}" for page in (out / "man").iterdir()}
        build_data["shared_data"] |= {
            f"{out}/completions/sortd.bash": "share/bash-completion/completions/sortd",
            f"{out}/completions/_sortd": "share/zsh/site-functions/_sortd",
            f"{out}/completions/sortd.fish": "share/fish/vendor_completions.d/sortd.fish",
        }

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact: str) -> None:
        """Remove the files, which the wheel has now."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
