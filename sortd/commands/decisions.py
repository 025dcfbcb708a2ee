"""The commands about decisions: ``explain`` says why an image goes where it goes, ``eval`` how good the classes are."""

from collections.abc import Mapping, Sequence
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
    from sortd.commands.explain import Explained

CLASSES_SHOWN = 10
SUSPECTS_SHOWN = 5
MODE_COLUMNS = {
    "mode": "mode",
    "new images": "distinct_accuracy",
    "of": "distinct_judged",
    "by class": "balanced_accuracy",
    "by image": "accuracy",
    "of all": "judged",
}
TRADE_COLUMNS = {"precision wanted": "precision", "filed": "filed", "of these right": "expected", "": "note"}
CLASS_COLUMNS = {
    "class": "label",
    "images": "references",
    "recall": "recall",
    "of": "judged",
    "precision": "precision",
    "confused with": "confused_with",
    "needs images": "needs_images",
}
TEXTS = {"mode", "label", "note", "confused_with", "needs_images"}

HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a page with pictures to this file.")]


def command_explain(
    image: Annotated[Path, typer.Argument(help="The image; it may lie anywhere.")],
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why an image is filed where it is filed, or why it is not."""
    from sortd.commands.explain import explain_image

    _see_that_it_fits(html)
    with progress("looking at the image"):
        explained = explain_image(load_config(config), image, dataset)
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


def command_eval(
    dataset: Annotated[str | None, typer.Argument(help="Only this dataset.")] = None,
    config: ConfigOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the references by themselves: which mode is best, which classes need images, which images are doubtful."""
    from sortd.commands.examination import examine
    from sortd.errors import SortdError

    _see_that_it_fits(html)
    examined: dict[str, dict[str, Any]] = {}
    refusal: SortdError | None = None
    with bar("loading the model") as tell:
        try:
            for one in examine(load_config(config), dataset, tell=tell):
                examined[one.dataset] = one.facts()
        except SortdError as error:
            if not examined:
                raise
            refusal = error
    if html is not None:
        from sortd.report import evaluation_page, write_page

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
    from sortd.report import evaluation_sentences

    print_line(
        f"{printable(name)}: {counted(facts['classes'], 'class')}, {counted(facts['references'], 'reference')}",
        style="bold",
    )
    for sentence in evaluation_sentences(facts):
        print_line(printable(sentence))
    for text in facts["calibration"]["notes"]:
        print_line(f"cannot be honoured: {text}", style="yellow")
    print_line("")
    modes = [
        {**one, "mode": f"{one['mode']} (in force)" if one["mode"] == facts["mode"] else one["mode"]}
        for one in facts["modes"]
    ]
    _print_facts(modes, MODE_COLUMNS)
    trades = [
        {**one, "precision": str(one["precision"]), "note": "" if one["is_attained"] else "too few references"}
        for one in facts["trade_offs"]
    ]
    if trades:
        _print_facts(trades, TRADE_COLUMNS)
    _print_facts(facts["class_reports"], CLASS_COLUMNS)
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
    from sortd.classify.prompts import written_name

    label, other = (printable(written_name(suspect[key] or "")) for key in ("label", "other_label"))
    match suspect["kind"]:
        case "mislabelled":
            return f"in {label}, but looks like {other} ({suspect['score']:.0%})"
        case "duplicate":
            return f"in {label}, and nearly the same picture is in {other} ({printable(suspect['other_source'])})"
    return f"in {label}, but unlike the rest of it ({suspect['score']:.2f})"


def _print_facts(facts: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table with the facts of these keys by column; floats are shares."""
    rows = [
        [f"{100 * one[key]:.1f} %" if isinstance(one[key], float) else one[key] for key in columns.values()]
        for one in facts
    ]
    print_table(tuple(columns), rows, right=[column for column, key in columns.items() if key not in TEXTS])
    print_line("")
