"""The log of a run: one JSON line for each report, and a plot of its curves."""

import json
from pathlib import Path
from typing import Any

Fact = float | int


class Journal:
    """Appends to `curves.jsonl` of a run."""

    def __init__(self, run: Path) -> None:
        """Set the path; the first line creates the file."""
        self._file = run / "curves.jsonl"

    def write(self, **facts: Fact) -> None:
        """Append one line."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Read every line."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def draw(self, picture: Path) -> bool:
        """Plot losses and accuracies over the run; return whether matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        lines = self.read()
        figure = Figure(figsize=(10, 4), layout="tight")
        for place, (title, starts) in enumerate(
            {"loss": ("loss",), "held out, per cent": ("zero_shot", "few_shot")}.items(), start=1
        ):
            axes = figure.add_subplot(1, 2, place)
            names = sorted({name for line in lines for name in line if name.startswith(starts)})
            for name in names:
                points = [(line["share"], line[name]) for line in lines if name in line]
                axes.plot(*zip(*points, strict=True), label=name)
            axes.set_title(title)
            axes.set_xlabel("share of the run")
            if names:
                axes.legend(fontsize="small")
        figure.savefig(picture, dpi=110)
        return True
