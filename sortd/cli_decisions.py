"""The commands about decisions: ``explain`` says why one image goes where it goes, ``eval`` how good the classes are."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sortd.console import (
    ConfigOption,
    DatasetOption,
    JsonOption,
    load_config,
    print_json,
    print_line,
    print_table,
    printable,
    say,
)

if TYPE_CHECKING:
    from sortd.explain import Explained, LoadEncoder

CLASSES_SHOWN = 10

HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a page with pictures to this file.")]


def explain(
    image: Annotated[Path, typer.Argument(help="The image; it may lie anywhere.")],
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why an image is filed where it is filed, or why it is not."""
    explain_with(image, config, dataset, html=html, as_json=as_json)


def explain_with(  # noqa: PLR0913 -- the options, and what stands in for the model
    image: Path,
    config: Path | None,
    dataset: str | None,
    *,
    html: Path | None,
    as_json: bool,
    load_encoder: "LoadEncoder | None" = None,
) -> None:
    """Explain; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stands in the way.
    """
    from sortd.explain import explain_image

    explained = explain_image(load_config(config), image, dataset, load_encoder=load_encoder)
    if as_json:
        print_json(explained.facts())
    else:
        _print_explained(explained)
    if html is not None:
        from sortd.report import explain_page, write_page

        write_page(html, explain_page(explained.facts(), now=datetime.now().astimezone()))
        say(f"sortd: the page is in {html}")


def _print_explained(explained: "Explained") -> None:
    from sortd.moments import shown

    explanation = explained.explanation
    print_line(printable(explained.path), style="bold")
    first, *rest = explained.sentences()
    print_line(printable(first), style="bold green" if explanation.is_filed else "bold yellow")
    for sentence in rest:
        print_line(printable(sentence))
    print_line("")
    scores = explanation.scores[:CLASSES_SHOWN]
    rows = [
        (one.label, f"{one.score:.3f}", "" if one.nearest is None else f"{one.nearest:.3f}", one.references)
        for one in scores
    ]
    print_table(("class", "score", "nearest", "references"), rows, right=("score", "nearest", "references"))
    if len(explanation.scores) > len(scores):
        say(f"sortd: and {len(explanation.scores) - len(scores)} classes more; --json has them all")
    print_line("")
    near = [(one.label, f"{one.similarity:.3f}", one.path) for one in explanation.neighbours]
    print_table(("nearest references", "cosine", "file"), near, right=("cosine",))
    for record in explained.records:
        done = record["outcome"].replace("_", " ")
        print_line(f"{shown(record['at'])} {done}: {printable(record['from'])} -> {printable(record['to'])}")
