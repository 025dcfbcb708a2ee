"""The commands ``explain``, ``eval`` and ``groups``."""

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
    from sortd.commands.explain import ImageExplanation

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

HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write an HTML page to this file.")]


def explain_command(
    image: Annotated[Path, typer.Argument(help="Path of the image, in any folder.")],
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain where an image is filed, and why."""
    from sortd.commands.explain import explain_image

    _check_page(html)
    with progress("reading the image"):
        explained = explain_image(load_config(config), image, dataset)
    if html is not None:
        from sortd.commands.report import explain_page, write_page

        write_page(html, explain_page(explained.facts(), now=datetime.now().astimezone()))
        say(f"sortd: page written to {html}")
    if as_json:
        print_json(explained.facts())
    else:
        _print_explained(explained)


def _check_page(html: Path | None) -> None:
    if html is not None:
        from sortd.commands.report import check_page_path

        check_page_path(html)


def _print_explained(explained: "ImageExplanation") -> None:
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
        say(f"sortd: {len(explanation.scores) - len(scores)} more classes; --json prints all")
    print_line("")
    near = [(one.label, f"{one.similarity:.3f}", one.path) for one in explanation.neighbours]
    print_table(("nearest references", "cosine", "file"), near, right=("cosine",))
    for record in explained.records:
        done = record["outcome"].replace("_", " ")
        print_line(f"{format_time(record['at'])} {done}: {printable(record['from'])} -> {printable(record['to'])}")


def evaluate_command(
    dataset: Annotated[str | None, typer.Argument(help="Evaluate only this dataset.")] = None,
    config: ConfigOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the references by leave-one-out: modes, classes that need images, and suspect images."""
    from sortd.commands.examination import evaluate_datasets
    from sortd.errors import SortdError

    _check_page(html)
    examined: dict[str, dict[str, Any]] = {}
    refusal: SortdError | None = None
    with bar("loading the model") as tell:
        try:
            for one in evaluate_datasets(load_config(config), dataset, tell=tell):
                examined[one.dataset] = one.facts()
        except SortdError as error:
            if not examined:
                raise
            refusal = error
    if html is not None:
        from sortd.commands.report import evaluation_page, write_page

        write_page(html, evaluation_page(examined, now=datetime.now().astimezone()))
        say(f"sortd: page written to {html}")
    if as_json:
        print_json({"datasets": examined})
    else:
        for name, facts in examined.items():
            _print_evaluation(name, facts)
    if refusal is not None:
        raise refusal


def _print_evaluation(name: str, facts: Mapping[str, Any]) -> None:
    from sortd.commands.report import evaluation_sentences

    print_line(
        f"{printable(name)}: {counted(facts['classes'], 'class')}, {counted(facts['references'], 'reference')}",
        style="bold",
    )
    for sentence in evaluation_sentences(facts):
        print_line(printable(sentence))
    for text in facts["calibration"]["notes"]:
        print_line(f"setting not met: {text}", style="yellow")
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
            print_line(f"{len(doubtful) - SUSPECTS_SHOWN} more {kind}; --html shows them", style="yellow")
    for one in facts["unreadable"]:
        print_line(f"cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")
    print_line("")


def _doubt(suspect: Mapping[str, Any]) -> str:
    from sortd.classify.prompts import written_name

    label, other = (printable(written_name(suspect[key] or "")) for key in ("label", "other_label"))
    match suspect["kind"]:
        case "mislabelled":
            return f"probably mislabelled: in {label}, resembles {other} ({suspect['score']:.0%})"
        case "duplicate":
            return f"near-duplicate: in {label}, and in {other} ({printable(suspect['other_source'])})"
    return f"outlier of {label} ({suspect['score']:.2f})"


def _print_facts(facts: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table of facts; ``columns`` maps titles to keys, floats are shares."""
    rows = [
        [f"{100 * one[key]:.1f} %" if isinstance(one[key], float) else one[key] for key in columns.values()]
        for one in facts
    ]
    print_table(tuple(columns), rows, right=[column for column, key in columns.items() if key not in TEXTS])
    print_line("")


def groups_command(
    dataset: Annotated[str | None, typer.Argument(help="Group only this dataset. Default: all.")] = None,
    config: ConfigOption = None,
    page: Annotated[Path | None, typer.Option("--page", "--html", help="Write an HTML page with the pictures.")] = None,
    accept: Annotated[str | None, typer.Option("--accept", help="Make a class from the group with this id.")] = None,
    name: Annotated[str | None, typer.Option("--as", help="The name of that class.")] = None,
    without: Annotated[
        list[Path] | None, typer.Option("--without", help="Leave this image out of that class; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Group the images in Review/ that resemble each other, and make a class from a group."""
    from sortd.commands.groups import accept_group, group_piles

    if (accept is None) != (name is None) or (without and accept is None):
        raise typer.BadParameter("give --accept ID together with --as NAME; --without only with these")
    _check_page(page)
    loaded = load_config(config)
    with progress("reading the images"):
        piles = list(group_piles(loaded, dataset))
    if accept is not None and name is not None:
        reply = accept_group(loaded, piles, accept, name, without or ())
        if as_json:
            print_json(reply)
        else:
            _print_accepted(reply)
        raise typer.Exit(65 if any(one["destination"] is None for one in reply["assigned"]) else 0)
    facts = {pile.layout.name: pile.facts() for pile in piles}
    if page is not None:
        from sortd.commands.report import groups_page, write_page

        write_page(page, groups_page(facts, now=datetime.now().astimezone()))
        say(f"sortd: page written to {page}")
    if as_json:
        print_json({"datasets": facts})
    else:
        for one in facts.items():
            _print_groups(*one)


def _print_accepted(reply: Mapping[str, Any]) -> None:
    for one in reply["assigned"]:
        if one["destination"] is None:
            print_line(f"not moved: {printable(one['message'])}", style="yellow")
        else:
            print_line(f"{printable(one['path'])} -> {printable(one['destination'])}")
    done = sum(one["destination"] is not None for one in reply["assigned"])
    said = f"sortd: {counted(done, 'image')} assigned to {printable(reply['label'])}, as references where they lie"
    say(f"{said}; to take them back: sortd undo --last {done}" if done else said)
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} still to be copied to another file system")


def _print_groups(name: str, facts: Mapping[str, Any]) -> None:
    print_line(f"{printable(name)}: {counted(facts['waiting'], 'image')} in Review/", style="bold")
    rows = [
        (
            one["id"],
            one["size"],
            "" if one["familiarity"] is None else f"{one['familiarity']:+.2f}",
            one["nearest_label"],
            "yes" if one["is_new"] else "",
            one["members"][0],
        )
        for one in facts["groups"]
    ]
    if rows:
        columns = ("group", "images", "familiarity", "nearest class", "new class?", "most typical image")
        print_table(columns, rows, right=("images", "familiarity"))
        say("sortd: --page FILE shows the pictures; --accept ID --as NAME makes a class from a group")
    for path in facts["next_to_label"]:
        print_line(f"label next: {printable(path)}")
    for one in facts["unreadable"]:
        print_line(f"cannot be read: {printable(one['path'])}: {printable(one['message'])}", style="yellow")
