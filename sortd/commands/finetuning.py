"""The command ``finetune``: options, progress bar and output."""

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
from sortd.service import Signalled, signals_posted

if TYPE_CHECKING:
    from sortd.encoder.finetuned import FinetunedFacts

_DEFAULT = Recipe()
LEFT_OUT_SHOWN = 10


def finetune(  # noqa: PLR0913, PLR0917 -- a command's options are its parameters
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    config: ConfigOption = None,
    source: Annotated[Source, typer.Option("--from", help="Folders to train on.")] = Source.CLASES,
    base: Annotated[
        str, typer.Option(help="auto, packaged, or the name or folder of a transformers image model.")
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Result folder. Default: a new one in the state folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the newest unfinished training.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 20 epochs, but at least 300 steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Peak learning rate. Default: the base's.")
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Factor of the learning rate per layer.")
    ] = _DEFAULT.layer_decay,
    balance: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of rare classes; 0: images have equal weight, 1: classes.")
    ] = _DEFAULT.balance,
    test: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of test images.")] = _DEFAULT.test,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of validation images.")
    ] = _DEFAULT.validation,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the split and the training.")] = _DEFAULT.seed,
    side: Annotated[int | None, typer.Option(min=16, help="Input size in pixels. Default: the base's.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train LoRA layers of this rank (needs peft).")] = None,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Also train on mirrored images.")] = True,
    extra: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers' TrainingArguments; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an image model on a dataset, and compare it with the prototypes."""
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
        raise typer.BadParameter("several processes need the option --output", param_hint="--output")
    if output is not None:
        place = output.absolute()
    elif resume:
        place = run.unfinished_of(request, loaded.state_dir)
    else:
        place = run.output_of(request, loaded.state_dir, now)
    with observing() as observer:
        try:
            facts = run.run_finetuning(request, loaded, place, now=now, resume=resume, observer=observer)
        except TrainingStoppedError as error:
            said = [f"--config {config}"] * (config is not None) + [f"--output {output}"] * (output is not None)
            again = " ".join(["sortd finetune", dataset, *said, "--resume"])
            raise TrainingStoppedError(f"{error}; continue with `{again}`") from error
    if facts is not None:
        _print_result(facts, place, as_json=as_json)


def require_training_packages(find: Callable[[str], object | None] = find_spec) -> None:
    """Raise ModelError if the extra ``train`` is not installed."""
    missing = [name for name in ("accelerate", "matplotlib") if find(name) is None]
    if missing:
        raise ModelError(f"fine-tuning needs {' and '.join(missing)}: pip install 'sortd-images[train]'")


@contextmanager
def observing() -> Iterator[Observer]:
    """Show a progress bar on a terminal, and handle signals.

    SIGINT, SIGTERM and SIGHUP stop the training after the current step, with a checkpoint; at other times, at once.
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
    task = bar.add_task("reading images", total=None, score="")
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
        printed = {key: value for key, value in metrics.items() if key != "log"}
        print_json({"folder": str(folder), "model_id": facts.model_id, **printed})
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
        f"{compared['verdict']} compared with mode {compared['best_mode']} "
        f"on {counted(compared['images'], 'test image')} (McNemar p = {compared['mcnemar']['p_value']:.3g})",
        style="bold",
    )
    print_line(printable(f"result written to {folder}"))
    for note in metrics["data"]["notes"]:
        say(f"sortd: {printable(note)}")
    for one in left_out[:LEFT_OUT_SHOWN]:
        say(f"sortd: left out: {printable(one['path'])}: {one['why']}")
    if len(left_out) > LEFT_OUT_SHOWN:
        say(f"sortd: left out: {len(left_out) - LEFT_OUT_SHOWN} more; metrics.json lists all")
