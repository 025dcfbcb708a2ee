"""The command ``finetune``: its options, its bar with the time left, and what it says at the end."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sortd.commands.console import (
    ConfigOption,
    JsonOption,
    counted,
    load_config,
    print_json,
    print_line,
    print_table,
    printable,
    say,
)
from sortd.finetuning.recipe import Recipe

if TYPE_CHECKING:
    from sortd.config import Config
    from sortd.finetuned import FinetunedFacts
    from sortd.finetuning.preparation import LoadEncoder, Order
    from sortd.finetuning.training import Observer, Progress
    from sortd.layout import Layout

_DEFAULT = Recipe()
LEFT_OUT_SHOWN = 10


def finetune(  # noqa: PLR0913, PLR0917 -- a command's options are its parameters
    dataset: Annotated[str, typer.Argument(help="The dataset to learn from.")],
    config: ConfigOption = None,
    source: Annotated[
        str, typer.Option("--from", help="Which folders: clases, dataset (what was filed), or both.")
    ] = "clases",
    base: Annotated[
        str, typer.Option(help="auto, packaged, or an image model of transformers by name or folder.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="The folder to make; by itself one in the dataset's state folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished training.")] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the photos; by itself 20, of few photos more.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos a step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="At its highest; by itself what suits the base.")
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Rate of a layer as a share of the one above.")
    ] = _DEFAULT.layer_decay,
    balance: Annotated[
        float, typer.Option(min=0, max=1, help="0: every photo counts alike, 1: every class does.")
    ] = _DEFAULT.balance,
    test: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share that judges.")] = _DEFAULT.test,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share that chooses between checkpoints.")
    ] = _DEFAULT.validation,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of training.")] = _DEFAULT.seed,
    side: Annotated[int | None, typer.Option(min=16, help="Pixels of what is seen, where the base allows.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank additions of this rank (peft).")] = None,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Mirrored photos are the same thing.")] = True,
    extra: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers' TrainingArguments; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an image model on a dataset's folders, and say whether it beats the prototypes."""
    recipe = replace(
        _DEFAULT,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        balance=balance,
        test=test,
        validation=validation,
        seed=seed,
        lora_rank=lora,
        flips=flips,
    )
    wanted = {"source": source, "base": base, "side": side, "recipe": recipe, "extra": tuple(extra or ())}
    finetune_with(dataset, config, wanted, output=output, resume=resume, as_json=as_json)


def finetune_with(
    dataset: str,
    config: Path | None,
    wanted: Mapping[str, Any],
    *,
    output: Path | None,
    resume: bool,
    as_json: bool,
    load_encoder: "LoadEncoder | None" = None,
) -> None:
    """Fine-tune; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stands in the way.
        typer.BadParameter: an option is none.
    """
    see_that_it_can_train()
    from sortd.finetune import finetune as run
    from sortd.finetune import unfinished_of
    from sortd.finetuning.preparation import Order
    from sortd.finetuning.training import StoppedError

    loaded, now = load_config(config), datetime.now(UTC)
    order = Order(layout=_layout(loaded, dataset), **{**wanted, "source": _source(wanted["source"])})
    if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("several processes need one place to meet: give --output", param_hint="--output")
    place = output.absolute() if output else (unfinished_of if resume else _fresh(now))(order, loaded.state_dir)
    with observing() as observer:
        try:
            facts = run(order, loaded, place, now=now, resume=resume, load_encoder=load_encoder, observer=observer)
        except StoppedError as error:
            raise StoppedError(f"{error}; go on with `{_again(dataset, config, output)}`") from error
    if facts is not None:
        _tell(facts, place, as_json=as_json)


def see_that_it_can_train(find: Callable[[str], object | None] = find_spec) -> None:
    """Refuse early where the extra is not installed.

    Raises:
        ModelError: with the command that brings it.
    """
    from sortd.errors import ModelError

    missing = [name for name in ("accelerate", "matplotlib") if find(name) is None]
    if missing:
        raise ModelError(f"fine-tuning needs {' and '.join(missing)}: pip install 'sortd-images[train]'")


def _layout(config: "Config", dataset: str) -> "Layout":
    from sortd.errors import DataError
    from sortd.layout import find_datasets

    layouts = {layout.name: layout for layout in find_datasets(config.root)}
    if dataset not in layouts:
        there = ", ".join(layouts) or "none; `sortd init DIR` makes one"
        raise DataError(f"there is no dataset {dataset!r} in {config.root}; there are: {there}")
    return layouts[dataset]


def _source(name: str) -> Any:  # noqa: ANN401 - a Source, whose module imports numpy
    from sortd.finetuning.photos import Source

    if name not in set(Source):
        raise typer.BadParameter(f"{name!r} is none of {', '.join(Source)}", param_hint="--from")
    return Source(name)


def _fresh(now: datetime) -> Any:  # noqa: ANN401 - a function of the same arguments as ``unfinished_of``
    from sortd.finetune import output_of

    def place(order: "Order", state: Path) -> Path:
        return output_of(order, state, now)

    return place


def _again(dataset: str, config: Path | None, output: Path | None) -> str:
    said = [f"--config {config}"] * (config is not None) + [f"--output {output}"] * (output is not None)
    return " ".join(["sortd finetune", dataset, *said, "--resume"])


@contextmanager
def observing() -> "Iterator[Observer]":
    """Show a bar with the time left on a terminal, and hear signals.

    While it trains, SIGINT, SIGTERM and SIGHUP are heard between two steps, and a checkpoint is written; before and
    after, where nothing would be lost, they end it at once.
    """
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from sortd.finetuning.training import Observer
    from sortd.systemd import Signalled, signals_posted

    heard: list[Signalled] = []
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[score]}"),
        console=Console(stderr=True, highlight=False),
        disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0",
    )
    task = bar.add_task("reading the photos", total=None, score="")
    training = False

    def finished(part: str) -> None:
        nonlocal training
        training = False
        bar.update(task, description=f"{part}: done")

    def progress(now: "Progress") -> None:
        nonlocal training
        training = True
        scored = {} if now.score is None else {"score": f"validation {now.score:.1%}"}
        bar.update(task, description="training", completed=now.step, total=now.steps, **scored)  # type: ignore[arg-type]

    def hear(signalled: Signalled) -> None:
        if signalled.number == signal.SIGUSR1:
            return
        heard.append(signalled)
        if not training:
            raise KeyboardInterrupt

    with bar, signals_posted(hear):
        yield Observer(finished, progress, lambda: bool(heard))


def _tell(facts: "FinetunedFacts", folder: Path, *, as_json: bool) -> None:
    if as_json:
        told = {key: value for key, value in facts.metrics.items() if key != "log"}
        print_json({"folder": str(folder), "model_id": facts.model_id, **told})
        return
    metrics = facts.metrics
    compared = metrics["comparison"]
    rows = [(f"prototypes, {mode}", *_cells(one)) for mode, one in compared["prototypes"].items()]
    rows.append(("fine-tuned", *_cells(compared["finetuned"])))
    columns = ("classifier", "accuracy", "macro F1", "calibration error")
    print_table(columns, rows, right=columns[1:])
    print_line("")
    print_line(
        f"on {counted(compared['images'], 'image')} held back, against {compared['best_mode']}: {compared['verdict']} "
        f"(McNemar p = {compared['mcnemar']['p_value']:.3g})",
        style="bold",
    )
    print_line(printable(f"the model, its card and its pictures are in {folder}"))
    for note in metrics["data"]["notes"]:
        say(f"sortd: {printable(note)}")
    for one in metrics["left_out"][:LEFT_OUT_SHOWN]:
        say(f"sortd: left out: {printable(one['path'])}: {one['why']}")
    if len(metrics["left_out"]) > LEFT_OUT_SHOWN:
        say(f"sortd: and {len(metrics['left_out']) - LEFT_OUT_SHOWN} more; metrics.json has them all")


def _cells(one: Mapping[str, Any]) -> tuple[str, str, str]:
    error = one["calibration_error"]
    return f"{one['accuracy']:.1%}", f"{one['macro_f1']:.1%}", f"{error:.3f}"
