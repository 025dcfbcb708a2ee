"""Fine-tune an image classifier on a dataset's folders, judge it beside the prototypes, and write it down."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from sortd.config import Config
from sortd.errors import AlreadyRunningError, DataError
from sortd.finetuned import FinetunedFacts
from sortd.finetuning.arguments import training_arguments
from sortd.finetuning.averaging import weights_of
from sortd.finetuning.base import Base, load_base
from sortd.finetuning.judging import judge_and_write
from sortd.finetuning.lora import add_lora, merge_lora
from sortd.finetuning.network import Network, device_of, load_weights
from sortd.finetuning.plan import PLAN_FILE, START_FILE, Plan, lesson_of, read_plan, writing
from sortd.finetuning.preparation import LoadEncoder, Order, prepare
from sortd.finetuning.result import clear, publish, save_tensors
from sortd.finetuning.start import teach_head
from sortd.finetuning.trainee import class_weights_of, make_trainee
from sortd.finetuning.training import Observer, Schedule, Trained, train
from sortd.promotion import RESULTS_FOLDER, UNFINISHED


def output_of(order: Order, state: Path, now: datetime) -> Path:
    """Return where a result goes by itself: in the dataset's state folder, by time (UTC) and seed."""
    return order.layout.state_folder(state) / RESULTS_FOLDER / f"{now:%Y%m%dT%H%M%SZ}-{order.recipe.seed}"


def unfinished_of(order: Order, state: Path) -> Path:
    """Return the place of the newest result of a dataset that was begun and not finished.

    Raises:
        DataError: there is none.
    """
    folder = order.layout.state_folder(state) / RESULTS_FOLDER
    found = sorted(path for path in folder.glob(f"*{UNFINISHED}") if (path / PLAN_FILE).is_file())
    if not found:
        raise DataError(f"there is no unfinished training in {folder} to resume; run it without --resume")
    return found[-1].with_name(found[-1].name.removesuffix(UNFINISHED))


def finetune(
    order: Order,
    config: Config,
    output: Path,
    *,
    now: datetime,
    resume: bool = False,
    load_encoder: LoadEncoder | None = None,
    observer: Observer | None = None,
) -> FinetunedFacts | None:
    """Prepare, train, average, calibrate, compare and write; or go on where a run was interrupted.

    Args:
        order: what is wanted; of a resumed run all but the layout comes from its plan.
        config: where everything is; the prototypes that are compared with are those of its encoder.
        output: the folder to be; its work folder stands beside it.
        now: the time.
        resume: go on from the newest checkpoint.
        load_encoder: stands in for the configured model.
        observer: told how far it is, and asked whether to stop.

    Returns:
        The facts of the folder that was written; None in a process that does not lead its team.

    Raises:
        DataError: the dataset cannot be trained on, or there is nothing to resume.
        ConfigError: what the order sets of the Trainer's arguments it does not take.
        ModelError: the encoder or the base cannot be had.
        StoppedError: it was asked to stop, or interrupted; it can be resumed.
        StorageError: the disk is full.
    """
    began, observer = time.monotonic(), observer or Observer()
    work = output.with_name(output.name + UNFINISHED)
    if output.exists():
        raise DataError(f"{output} is there already; choose another place with --output")
    team = Team(config.device)
    training_arguments(order.recipe, work, team.device.type, order.extra, images=1)  # a wrong one is to fail now
    with _working_in(work, resume=resume) if team.leads else nullcontext():
        if team.leads and not resume:
            stamp = f"{now:%Y-%m-%dT%H:%M:%SZ}"
            prepare(order, config, work, created=stamp, load_encoder=load_encoder, tell=observer.finished)
        team.meet()
        plan = read_plan(work)
        network, base = _network(plan, config)
        if team.leads and not (work / START_FILE).is_file():
            _teach(network, plan, work)
            observer.finished("teaching the head")
        team.meet()
        load_weights(network.module, work / START_FILE)
        start = weights_of(network.module)
        schedule = Schedule(plan.recipe, work, network.device.type, resume, plan.extra, observer)
        trained = _train(network, plan, work, schedule)
        if not team.leads:
            return None
        observer.finished("training")
        beside = judge_and_write(network, base, start, plan, work, trained, seconds=time.monotonic() - began)
        facts = publish(beside, output)
        clear(work)
        return facts


class Team:
    """The processes of one training, as ``torchrun`` or ``accelerate launch`` start them; usually it is one."""

    def __init__(self, device: str) -> None:
        """Find out from the environment whether there are others; the first one leads."""
        self._is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        self.leads = self._is_alone or os.environ.get("RANK", "0") == "0"
        self.device = device_of(device)

    def meet(self) -> None:
        """Wait until every process has come this far."""
        if not self._is_alone:
            from accelerate import PartialState

            PartialState(cpu=self.device.type == "cpu").wait_for_everyone()


@contextmanager
def _working_in(work: Path, *, resume: bool) -> Iterator[None]:
    """Make the work folder, or take it up again, for this process alone; one that holds no plan yet does not stay.

    Raises:
        AlreadyRunningError: another process trains there.
        DataError: there is nothing to resume.
    """
    if resume and not (work / PLAN_FILE).is_file():
        raise DataError(f"there is no unfinished training in {work} to resume; run it without --resume")
    if not resume and (work / PLAN_FILE).is_file():
        raise DataError(f"{work} holds an unfinished training; go on with it by --resume, or remove it")
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AlreadyRunningError(f"another process trains in {work}") from error
    try:
        yield
    finally:
        if not (work / PLAN_FILE).is_file():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def _network(plan: Plan, config: Config) -> tuple[Network, Base]:
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    base = load_base(plan.base, plan.labels, cache_dir=config.cache_dir, side=plan.side)
    return Network(base.module, base.processor, device_of(config.device)), base


def _teach(network: Network, plan: Plan, work: Path) -> None:
    """Teach the head, and keep the weights that training starts from: a resumed run averages with the same."""
    teach_head(network, lesson_of(plan, work, "train"), lesson_of(plan, work, "validation"), plan.recipe)
    beside = work / f"{START_FILE}.part"
    save_tensors(network.module.state_dict(), beside)
    with writing(work):
        beside.replace(work / START_FILE)


def _train(network: Network, plan: Plan, work: Path, schedule: Schedule) -> Trained:
    """Train the network in place; its best weights are in it afterwards."""
    import torch

    lesson, validation = lesson_of(plan, work, "train"), lesson_of(plan, work, "validation")
    counts = np.bincount(lesson.classes, weights=lesson.weights, minlength=len(plan.labels))
    if plan.recipe.lora_rank is not None:
        network.module = add_lora(network.module, plan.recipe.lora_rank)
    seen = plan.preprocessing
    class_weights = class_weights_of(torch.from_numpy(counts), plan.recipe)
    trainee = make_trainee(network, (seen.crop_height, seen.crop_width), class_weights, plan.recipe)
    trained = train(trainee, lesson, validation, schedule)
    if plan.recipe.lora_rank is not None:
        network.module = merge_lora(network.module)
    network.module.eval()
    return trained
