"""Build hook of hatchling: the files that a wheel has beside the package."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GENERATED = Path("build", "generated")
"""Where ``make`` has packaging/generate.py write man pages and completions; an archive of the source has them too."""

COMPLETIONS = {
    "sortd.bash": "bash-completion/completions/sortd",
    "_sortd": "zsh/site-functions/_sortd",
    "sortd.fish": "fish/vendor_completions.d/sortd.fish",
}


class PackagedFiles(BuildHookInterface[Any]):
    """Adds the example configuration, the units, the man pages and the completions."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files; an editable installation reads those of the checkout."""
        if version == "editable":
            return
        generated = Path(self.root, GENERATED)
        if self.target_name == "sdist":
            if generated.is_dir():
                build_data["force_include"][str(generated)] = GENERATED.as_posix()
            return
        for name in ("config.example.yaml", "systemd"):
            build_data["force_include"][str(Path(self.root, name))] = f"sortd/{name}"
        for page in sorted(generated.glob("man/*.1")):
            build_data["shared_data"][str(page)] = f"share/man/man1/{page.name}"
        for name, target in COMPLETIONS.items():
            if (generated / "completions" / name).is_file():
                build_data["shared_data"][str(generated / "completions" / name)] = f"share/{target}"
