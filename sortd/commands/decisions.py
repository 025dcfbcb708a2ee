"""The commands about decisions: ``explain`` says why an image goes where it goes, ``eval`` how good the classes are."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sortd.commands.console import (
    ConfigOption,
    DatasetOption,
    JsonOption,
    bar,
    counted,
    format_time,
    load_config,
    print_json,
    print_line,
    print_table,
    printable,
    progress,
    say,
)

if TYPE_CHECKING:
    from sortd.commands.explain import Explained, LoadEncoder

CLASSES_SHOWN = 10
SUSPECTS_SHOWN = 5

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


def explain_with(
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
    from sortd.commands.explain import explain_image

    _see_that_it_fits(html)
    with progress("looking at the image"):
        explained = explain_image(load_config(config), image, dataset, load_encoder=load_encoder)
    if html is not None:
        from sortd.report import explain_page, write_page

        write_page(html, explain_page(explained.facts(), now=datetime.now().astimezone()))
        say(f"sortd: the page is in {html}")
    if as_json:
        print_json(explained.facts())
    else:
        _print_explained(explained)


def _see_that_it_fits(html: Path | None) -> None:
    if html is not None:
        from sortd.report import see_that_a_page_fits

        see_that_a_page_fits(html)


def _print_explained(explained: "Explained") -> None:
    explanation = explained.explanation
    print_line(printable(explained.path), style="bold")
    first, *rest = explained.sentences()
    is_filed = explanation.is_filed and explained.left is None
    print_line(printable(first), style="bold green" if is_filed else "bold yellow")
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
        print_line(f"{format_time(record['at'])} {done}: {printable(record['from'])} -> {printable(record['to'])}")


def evaluate(
    dataset: Annotated[str | None, typer.Argument(help="Only this dataset.")] = None,
    config: ConfigOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the references by themselves: which mode is best, which classes need images, which images are doubtful."""
    evaluate_with(dataset, config, html=html, as_json=as_json)


def evaluate_with(
    dataset: str | None,
    config: Path | None,
    *,
    html: Path | None,
    as_json: bool,
    load_encoder: "LoadEncoder | None" = None,
) -> None:
    """Evaluate; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stands in the way.
    """
    from sortd.commands.examination import examine
    from sortd.errors import SortdError

    _see_that_it_fits(html)
    examined: dict[str, dict[str, Any]] = {}
    refusal: SortdError | None = None
    with bar("loading the model") as tell:
        try:
            for one in examine(load_config(config), dataset, load_encoder=load_encoder, tell=tell):
                examined[one.dataset] = one.facts()
        except SortdError as error:
            if not examined:
                raise
            refusal = error
    if html is not None:
        from sortd.commands.evaluation_page import evaluation_page
        from sortd.report import write_page

        write_page(html, evaluation_page(examined, now=datetime.now().astimezone()))
        say(f"sortd: the page is in {html}")
    if as_json:
        print_json({"datasets": examined})
    else:
        for name, facts in examined.items():
            _print_evaluation(name, facts)
    if refusal is not None:
        raise refusal


def _print_evaluation(name: str, facts: Mapping[str, Any]) -> None:
    from sortd.commands.evaluation_page import sentences

    print_line(
        f"{printable(name)}: {counted(facts['classes'], 'class')}, {counted(facts['references'], 'reference')}",
        style="bold",
    )
    for sentence in sentences(facts):
        print_line(printable(sentence))
    for text in facts["calibration"]["notes"]:
        print_line(f"cannot be honoured: {text}", style="yellow")
    print_line("")
    modes = [
        (
            f"{one['mode']} (in force)" if one["mode"] == facts["mode"] else one["mode"],
            _share(one["distinct_accuracy"]),
            one["distinct_judged"],
            _share(one["balanced_accuracy"]),
            _share(one["accuracy"]),
            one["judged"],
        )
        for one in facts["modes"]
    ]
    columns: tuple[str, ...] = ("new images", "of", "by class", "by image", "of all")
    print_table(("mode", *columns), modes, right=columns)
    print_line("")
    trades = [
        (
            one["precision"],
            _share(one["filed"]),
            _share(one["expected"]),
            "" if one["is_attained"] else "too few references",
        )
        for one in facts["trade_offs"]
    ]
    if trades:
        columns = ("precision wanted", "filed", "of these right")
        print_table((*columns, ""), trades, right=columns)
        print_line("")
    classes = [
        (
            one["label"],
            one["references"],
            _share(one["recall"]),
            one["judged"],
            _share(one["precision"]),
            one["confused_with"],
            one["needs_images"],
        )
        for one in facts["class_reports"]
    ]
    columns = ("images", "recognised", "of", "own among taken")
    print_table(("class", *columns, "taken for", "needs images"), classes, right=columns)
    for kind in ("mislabelled", "duplicate", "outlier"):
        doubtful = [one for one in facts["suspects"] if one["kind"] == kind]
        for one in doubtful[:SUSPECTS_SHOWN]:
            print_line(f"{_doubt(one)}: {printable(one['source'])}", style="yellow")
        if len(doubtful) > SUSPECTS_SHOWN:
            print_line(f"and {len(doubtful) - SUSPECTS_SHOWN} more like these; --html shows them", style="yellow")
    for one in facts["unreadable"]:
        print_line(f"cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")
    print_line("")


def _doubt(suspect: Mapping[str, Any]) -> str:
    from sortd.deciding.prompts import written_name

    label, other = written_name(suspect["label"]), written_name(suspect["other_label"] or "")
    label, other = printable(label), printable(other)
    match suspect["kind"]:
        case "mislabelled":
            return f"in {label}, but looks like {other} ({suspect['score']:.0%})"
        case "duplicate":
            return f"in {label}, and nearly the same picture is in {other} ({printable(suspect['other_source'])})"
    return f"in {label}, but unlike the rest of it ({suspect['score']:.2f})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
