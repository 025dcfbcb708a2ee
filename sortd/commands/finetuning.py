"""Fine-tuned models: the commands ``finetune``, ``models promote`` and ``models demote``."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import typer

from sortd.classify.proportions import estimated
from sortd.commands.console import counted, print_line, print_table, printable, progress, say, show
from sortd.commands.status import accuracy_comparison, dataset_named, result_facts
from sortd.config import Config
from sortd.daemon.control import AnsweredError, ask
from sortd.daemon.references import ReferencesAbsentError, class_labels
from sortd.daemon.resources import unfit
from sortd.encoder import finetuned
from sortd.encoder.finetuned import finetuning_results, read_facts
from sortd.errors import DataError, ModelError, StartupError
from sortd.finetune import run
from sortd.finetune.recipe import Observer, TrainingProgress, TrainingRequest, TrainingStoppedError
from sortd.layout import Area, Layout
from sortd.service import Signalled, signals_posted

LEFT_OUT_SHOWN = 10


def fine_tune(
    config: Config,
    request: TrainingRequest,
    *,
    output: Path | None,
    resume: bool,
    resume_command: str,
    as_json: bool,
) -> None:
    """Fine-tune an image model on a dataset, and print how it compares with the prototypes."""
    now = datetime.now(UTC)
    if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("several processes need the option --output", param_hint="--output")
    place = _place_of(config, request, now, output=output, resume=resume)
    with observing() as observer:
        try:
            facts = run.run_finetuning(request, config, place, now=now, resume=resume, observer=observer)
        except TrainingStoppedError as error:
            raise TrainingStoppedError(f"{error}; continue with `{resume_command}`") from error
    if facts is not None:
        printed = {key: value for key, value in facts.metrics.items() if key != "log"}
        shown = {"folder": str(place), "model_id": facts.model_id, **printed}
        show(shown, _print_result, as_json=as_json)


def _place_of(config: Config, request: TrainingRequest, now: datetime, *, output: Path | None, resume: bool) -> Path:
    if output is not None:
        return output.absolute()
    return run.unfinished_of(request, config.state_dir) if resume else run.output_of(request, config.state_dir, now)


def launch_training(
    config: Config, request: TrainingRequest, processes: int, *, output: Path | None, resume: bool
) -> NoReturn:
    """Become accelerate's launcher, which starts this command in so many processes that train together."""
    given = sys.argv[1:]
    if output is None:
        given += ["--output", str(_place_of(config, request, datetime.now(UTC), output=None, resume=resume))]
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--main_process_port=0"]
    options = [f"--num_processes={processes}", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", *launcher, *options, "--module", "sortd", *given]
    os.execv(command[0], command)  # noqa: S606 -- no shell is wanted


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return "RANK" in os.environ


def is_first_process() -> bool:
    """Return whether this process is the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def require_training_packages(find: Callable[[str], object | None] = find_spec) -> None:
    """Raise ModelError if the extra ``train`` is not installed."""
    missing = [name for name in ("accelerate", "matplotlib") if find(name) is None]
    if missing:
        raise ModelError(f"fine-tuning needs {' and '.join(missing)}: pip install 'sortd-images[train]'")


@contextmanager
def observing() -> Iterator[Observer]:
    """Show the progress of the first process, with the last validation accuracy, and handle signals.

    SIGINT, SIGTERM and SIGHUP stop the training after the current step, with a checkpoint; at other times, at once.
    """
    heard: list[Signalled] = []
    training, what = False, "training"

    def finished(part: str) -> None:
        nonlocal training
        training = False
        tell(f"{part}: done", 0, 0)

    def trained(now: TrainingProgress) -> None:
        nonlocal training, what
        training = True
        if now.accuracy is not None:
            what = f"training, validation {now.accuracy:.1%} at step {now.step:,}"
        tell(what, now.step, now.steps)

    def hear(signalled: Signalled) -> None:
        if signalled.number == signal.SIGUSR1:
            return
        heard.append(signalled)
        if not training:
            raise KeyboardInterrupt

    shown = progress("reading images") if is_first_process() else nullcontext(lambda *_: None)
    with shown as tell, signals_posted(hear):
        yield Observer(finished, trained, lambda: bool(heard))


def _print_result(metrics: Mapping[str, Any]) -> None:
    compared, left_out = metrics["comparison"], metrics["left_out"]
    named = {f"prototypes, {mode}": row for mode, row in compared["prototypes"].items()}
    rows = [
        (name, estimated(one["accuracy"], one["images"]), f"{one['macro_f1']:.3f}", f"{one['calibration_error']:.3f}")
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
    print_line(printable(f"result written to {metrics['folder']}"))
    for note in metrics["data"]["notes"]:
        say(f"sortd: {printable(note)}")
    for one in left_out[:LEFT_OUT_SHOWN]:
        say(f"sortd: left out: {printable(one['path'])}: {one['why']}")
    if len(left_out) > LEFT_OUT_SHOWN:
        say(f"sortd: left out: {len(left_out) - LEFT_OUT_SHOWN} more; metrics.json lists all")


def print_promoted(facts: Mapping[str, Any]) -> None:
    """Print the outcome of ``promote_model``."""
    name, place = printable(facts["dataset"]), printable(facts["folder"])
    if facts["serves"]:
        print_line(f"{name} is decided by {place}", style="bold green")
    else:
        reason = "because of `classifier: prototypes` in the configuration; set auto"
        print_line(f"{place} is promoted in {name} but not used, {reason}", style="bold yellow")
    own, best = (estimated(facts[key], facts["images"] or 0) for key in ("accuracy", "prototypes_accuracy"))
    print_line(f"  {facts['verdict']}: accuracy {own}, by mode {facts['best_mode']}: {best}")
    say(f"sortd: {facts['told']}")


def print_demoted(facts: Mapping[str, Any]) -> None:
    """Print the outcome of ``demote_model``."""
    print_line(f"{printable(facts['dataset'])} is decided by the prototypes", style="bold")
    say(f"sortd: {facts['told'] or 'no model was promoted; nothing changed'}")


def promote_model(config: Config, dataset: str | None, folder: Path | None, *, force: bool) -> dict[str, Any]:
    """Promote the fine-tuned model in a folder, or the newest of a dataset, and return the outcome as plain values.

    The running sortd is notified. With ``force`` also a model that is weaker than the prototypes is promoted.

    Raises:
        DataError: there is no such dataset or result, or the model has other classes or is weaker.
        ModelError: the result folder is invalid.
        DestinationError: the state folder cannot be written.
    """
    layout = dataset_named(config, dataset)
    state_folder = layout.state_folder(config.state_dir)
    found = finetuning_results(state_folder) if folder is None else [folder.absolute()]
    if not found:
        raise DataError(
            f"{layout.name} has no fine-tuned model in {state_folder}: run `sortd finetune --dataset "
            f"{layout.name}`, or give the folder of a model"
        )
    facts = read_facts(found[0])
    try:
        refusal = unfit(facts, class_labels(layout.area(Area.CLASES)), dataset=layout.name)
    except ReferencesAbsentError as error:
        raise DataError(f"{error}: the classes of the model cannot be checked; is the disk mounted?") from error
    if refusal is not None:
        raise DataError(refusal)
    if facts.verdict == "weaker" and not force:
        raise DataError(
            f"{facts.folder} is weaker than the prototypes on images that neither had seen "
            f"({accuracy_comparison(facts)}): fine-tune with more images, or promote it all the same with --force"
        )
    promotion = finetuned.Promotion(facts.folder, facts.model_id, facts.verdict, time.time())
    finetuned.write_promotion(state_folder, promotion)
    wanted = config.dataset(layout.name).classifier
    own = {"dataset": layout.name, "classifier": wanted, "serves": wanted != "prototypes"}
    return {**own, **result_facts(facts), "told": _notify(config, layout)}


def demote_model(config: Config, dataset: str | None) -> dict[str, Any]:
    """Remove the promotion of a dataset, notify the running sortd, and return the outcome.

    Raises as ``promote_model``.
    """
    layout = dataset_named(config, dataset)
    was_promoted = finetuned.remove_promotion(layout.state_folder(config.state_dir))
    told = _notify(config, layout) if was_promoted else None
    return {"dataset": layout.name, "demoted": was_promoted, "told": told}


def _notify(config: Config, layout: Layout) -> str:
    """Request a rebuild from the running sortd, and return the outcome in a sentence."""
    try:
        reply = ask(config.state_dir, {"do": "rebuild", "datasets": [layout.name], "force": False})
    except (AnsweredError, StartupError) as error:  # the next reload or start applies it
        return f"the running sortd did not apply it: {error}"
    if reply is None:
        return "sortd is not running; it will apply this at its next start"
    return "the running sortd applies it; `sortd status` shows the classifier in use"
