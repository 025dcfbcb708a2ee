"""The command ``finetune``: its options, its bar with the time left, and what it prints at the end."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from sortd.errors import ModelError
from sortd.finetune.recipe import Observer, Recipe, Source, TrainingProgress, TrainingRequest, TrainingStoppedError
from sortd.systemd import Signalled, signals_posted

if TYPE_CHECKING:
    from sortd.finetuned import FinetunedFacts

_DEFAULT = Recipe()
LEFT_OUT_SHOWN = 10


def finetune(  # noqa: PLR0913, PLR0917 -- a command's options are its parameters
    dataset: Annotated[str, typer.Argument(help="The dataset to learn from.")],
    config: ConfigOption = None,
    source: Annotated[
        Source, typer.Option("--from", help="Folders to learn from; dataset: what was filed.")
    ] = Source.CLASES,
    base: Annotated[
        str, typer.Option(help="auto, packaged, or a transformers image model, by name or folder.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="The folder to make. Default: one in the dataset's state folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the newest unfinished training.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 20, or as many as make 300 steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Peak learning rate. Default: the base's own.")
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Rate of a layer as a share of the one above.")
    ] = _DEFAULT.layer_decay,
    balance: Annotated[
        float, typer.Option(min=0, max=1, help="0: images count alike, 1: classes count alike.")
    ] = _DEFAULT.balance,
    test: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of test images.")] = _DEFAULT.test,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of images that choose the checkpoint.")
    ] = _DEFAULT.validation,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of training.")] = _DEFAULT.seed,
    side: Annotated[int | None, typer.Option(min=16, help="Input size in pixels, where the base allows.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train low-rank additions of this rank (peft).")] = None,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Train on mirrored images too.")] = True,
    extra: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers' TrainingArguments; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an image model on a dataset's folders, and say whether it beats the prototypes."""
    require_training_packages()
    from sortd.commands.promotion import dataset_named
    from sortd.finetune import run

    loaded, now = load_config(config), datetime.now(UTC)
    recipe = Recipe(
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
    request = TrainingRequest(dataset_named(loaded, dataset), source, base, side, recipe, tuple(extra or ()))
    if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("several processes need one place to meet: give --output", param_hint="--output")
    if output is not None:
        place = output.absolute()
    else:
        place = (
            run.unfinished_of(request, loaded.state_dir) if resume else run.output_of(request, loaded.state_dir, now)
        )
    with observing() as observer:
        try:
            facts = run.run_finetuning(request, loaded, place, now=now, resume=resume, observer=observer)
        except TrainingStoppedError as error:
            said = [f"--config {config}"] * (config is not None) + [f"--output {output}"] * (output is not None)
            again = " ".join(["sortd finetune", dataset, *said, "--resume"])
            raise TrainingStoppedError(f"{error}; go on with `{again}`") from error
    if facts is not None:
        _print_result(facts, place, as_json=as_json)


def require_training_packages(find: Callable[[str], object | None] = find_spec) -> None:
    """Refuse early where the extra ``train`` is not installed.

    Raises:
        ModelError: with the command that installs it.
    """
    missing = [name for name in ("accelerate", "matplotlib") if find(name) is None]
    if missing:
        raise ModelError(f"fine-tuning needs {' and '.join(missing)}: pip install 'sortd-images[train]'")


@contextmanager
def observing() -> Iterator[Observer]:
    """Show a bar with the time left on a terminal, and hear signals.

    While it trains, SIGINT, SIGTERM and SIGHUP end it after the step, with a checkpoint; before and after, when there
    is nothing to lose, at once.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    heard: list[Signalled] = []
    bar = Progress(
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

    def progress(now: TrainingProgress) -> None:
        nonlocal training
        training = True
        bar.update(task, description="training", completed=now.step, total=now.steps)
        if now.accuracy is not None:
            bar.update(task, score=f"validation {now.accuracy:.1%}")

    def hear(signalled: Signalled) -> None:
        if signalled.number == signal.SIGUSR1:
            return
        heard.append(signalled)
        if not training:
            raise KeyboardInterrupt

    with bar, signals_posted(hear):
        yield Observer(finished, progress, lambda: bool(heard))


def _print_result(facts: "FinetunedFacts", folder: Path, *, as_json: bool) -> None:
    metrics = facts.metrics
    if as_json:
        told = {key: value for key, value in metrics.items() if key != "log"}
        print_json({"folder": str(folder), "model_id": facts.model_id, **told})
        return
    compared, left_out = metrics["comparison"], metrics["left_out"]
    named = {f"prototypes, {mode}": row for mode, row in compared["prototypes"].items()}
    rows = [
        (name, f"{one['accuracy']:.1%}", f"{one['macro_f1']:.1%}", f"{one['calibration_error']:.3f}")
        for name, one in {**named, "fine-tuned": compared["finetuned"]}.items()
    ]
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
    for one in left_out[:LEFT_OUT_SHOWN]:
        say(f"sortd: left out: {printable(one['path'])}: {one['why']}")
    if len(left_out) > LEFT_OUT_SHOWN:
        say(f"sortd: and {len(left_out) - LEFT_OUT_SHOWN} more; metrics.json has them all")
