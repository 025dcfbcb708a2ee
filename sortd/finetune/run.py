"""Run or resume a fine-tuning: preparation, training, evaluation and result folder."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from sortd.arrays import FloatArray
from sortd.config import Config
from sortd.daemon.references import class_labels
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder.clip import PASSIVE_WAIT, torch_device
from sortd.encoder.finetuned import RESULTS_FOLDER, UNFINISHED, FinetunedFacts, Network, load_weights
from sortd.errors import AlreadyRunningError, DataError
from sortd.events import Preprocessing
from sortd.finetune import data, frozen
from sortd.finetune.model import (
    add_lora,
    find_base,
    init_head,
    load_base,
    logits_in_batches,
    views_of,
    weights_of,
)
from sortd.finetune.recipe import Observer, TrainingRequest
from sortd.finetune.report import baseline_predictions, evaluate_model, publish_result, save_tensors, write_result
from sortd.finetune.train import TrainSettings, make_model, train, training_arguments
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.layout import Area, Layout

LARGER = 1.25
"""Size of the stored training images as a multiple of the network's input, for sharp random crops."""
FEWEST_TESTS = 30
"""With fewer test images, a difference of ten points is not significant."""


def output_of(request: TrainingRequest, state: Path, now: datetime) -> Path:
    """Return the default result folder in the state folder, named by time (UTC) and seed."""
    name = f"{now:%Y%m%dT%H%M%SZ}-{request.recipe.seed}"
    return request.layout.state_folder(state) / RESULTS_FOLDER / name


def unfinished_of(request: TrainingRequest, state: Path) -> Path:
    """Return the result folder of the newest unfinished training; raise DataError if there is none."""
    folder = request.layout.state_folder(state) / RESULTS_FOLDER
    found = sorted(path for path in folder.glob(f"*{UNFINISHED}") if (path / data.PLAN_FILE).is_file())
    if not found:
        raise DataError(f"no unfinished training in {folder}; omit --resume")
    return found[-1].with_name(found[-1].name.removesuffix(UNFINISHED))


def run_finetuning(
    request: TrainingRequest,
    config: Config,
    output: Path,
    *,
    now: datetime,
    resume: bool = False,
    load_encoder: LoadEncoder | None = None,
    observer: Observer | None = None,
) -> FinetunedFacts | None:
    """Run a fine-tuning and return the facts of its result; None in a process that is not the main one.

    The work folder is created next to ``output``. With ``resume``, a run continues from the newest checkpoint, and only
    the layout of the request is used. ``load_encoder`` replaces the configured encoder, that of the baseline.

    Raises:
        DataError: the dataset cannot be trained on, the output exists, or there is nothing to resume.
        ConfigError: an option is invalid.
        ModelError: the encoder or the base is not available.
        TrainingStoppedError: the observer asked to stop.
        StorageError: a file cannot be written.
    """
    os.environ.setdefault(*PASSIVE_WAIT)  # before torch is loaded
    from accelerate import PartialState

    began, observer = time.monotonic(), observer or Observer()
    work = output.with_name(output.name + UNFINISHED)
    if output.exists():
        raise DataError(f"{output} exists; choose another folder with --output")
    device = torch_device(config.device)
    training_arguments(TrainSettings(request.recipe, work, device.type, extra=request.extra), images=1)  # fails early
    processes = PartialState(cpu=device.type == "cpu")  # usually one
    is_first = processes.is_main_process
    with _working_in(work, resume=resume) if is_first else nullcontext():
        if is_first and not resume:
            stamp = f"{now:%Y-%m-%dT%H:%M:%SZ}"
            prepare_training(request, config, work, created=stamp, load_encoder=load_encoder, tell=observer.finished)
        processes.wait_for_everyone()
        plan = data.read_plan(work)
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        base = load_base(plan.base, plan.labels, cache_dir=config.cache_dir, side=plan.side)
        network = Network(base.module, base.processor, device)
        trains_all = not plan.recipe.views or plan.recipe.lora_rank is not None
        part = None if trains_all else frozen.divide(network, _size(plan))
        with nullcontext() if part is None else closing(part):
            if is_first:
                _write_start(network, plan, part, observer.finished)
            processes.wait_for_everyone()
            load_weights(network.module, work / data.START_FILE)
            start = weights_of(network.module)
            settings = TrainSettings(plan.recipe, work, device.type, resume, plan.extra, observer)
            trained = _train_network(network, plan, settings, part)
            if not is_first:
                return None
            observer.finished("training")
            beside = work / "result"
            with data.disk_errors_translated(work):
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
            facts, table = evaluate_model(
                network, start, plan, beside, validation_logits=lambda: _logits(network, plan, part)
            )
        seconds = round(time.monotonic() - began, 1)
        facts = replace(facts, metrics={**facts.metrics, **trained, "seconds": seconds})
        write_result(facts, table, network.module, base.config, base.processor)
        facts = publish_result(beside, output)
        with data.disk_errors_translated(work):
            shutil.rmtree(work)
        return facts


@contextmanager
def _working_in(work: Path, *, resume: bool) -> Iterator[None]:
    """Create and lock the work folder; remove it afterwards if it has no plan.

    Raises:
        AlreadyRunningError: another process has locked it.
        DataError: there is nothing to resume, or an unfinished training.
    """
    if resume and not (work / data.PLAN_FILE).is_file():
        raise DataError(f"no unfinished training in {work}; omit --resume")
    if not resume and (work / data.PLAN_FILE).is_file():
        raise DataError(f"{work} holds an unfinished training; continue it with --resume, or remove it")
    with data.disk_errors_translated(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AlreadyRunningError(f"another process is training in {work}") from error
    try:
        yield
    finally:
        if not (work / data.PLAN_FILE).is_file():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def _size(plan: data.Plan) -> tuple[int, int]:
    return plan.preprocessing.crop_height, plan.preprocessing.crop_width


def _write_start(
    network: Network, plan: data.Plan, part: frozen.FrozenPart | None, tell: Callable[[str], None]
) -> None:
    """Write the features of the frozen part, and the start weights with the fitted head, unless they are there."""
    import torch

    recipe, size = plan.recipe, _size(plan)
    if part is not None and not all(
        part.has_features(data.features_file(plan.work, name), images=len(plan.classes[name]))
        for name in ("train", "validation")
    ):
        images = plan.images_of("train")
        count = part.views_within(recipe.views, len(images))
        views = views_of(recipe, size, random=count)[:count]
        torch.manual_seed(recipe.seed)
        for name, pixels, seen in (
            ("train", images.pixels, views),
            ("validation", plan.pixels_of("validation"), views[:1]),
        ):
            frozen.write_features(part, network, pixels, seen, data.features_file(plan.work, name))
        tell("computing the features of the frozen blocks")
    if (plan.work / data.START_FILE).is_file():
        return
    train_images, validation = (_images_of(plan, name, part) for name in ("train", "validation"))
    init_head(network, train_images, validation, recipe, size=size, frozen=part)
    tell("fitting the head")
    beside = plan.work / f"{data.START_FILE}.part"
    save_tensors(network.module.state_dict(), beside)
    with data.disk_errors_translated(plan.work):
        beside.replace(plan.work / data.START_FILE)


def _images_of(plan: data.Plan, name: str, part: frozen.FrozenPart | None) -> data.TrainDataset:
    """Return the images of a part of the data: pixels, or features of the frozen part of the network."""
    images = plan.images_of(name)
    if part is None:
        return images
    stored = part.read_features(data.features_file(plan.work, name))
    return replace(images, pixels=stored, views=len(stored) // max(1, len(images)))


def _logits(network: Network, plan: data.Plan, part: frozen.FrozenPart | None) -> FloatArray:
    """Return the logits of the validation images, from the features if there is a frozen part."""
    images = _images_of(plan, "validation", part).pixels
    return logits_in_batches(network, images) if part is None else part.logits(images, _size(plan))


def _train_network(
    network: Network, plan: data.Plan, settings: TrainSettings, part: frozen.FrozenPart | None
) -> dict[str, Any]:
    """Train the network in place and return the result of ``train``."""
    dataset, rank = _images_of(plan, "train", part), plan.recipe.lora_rank
    if rank is not None:
        network.module = add_lora(network.module, rank)
    model = make_model(network, _size(plan), dataset, plan.recipe, part)
    trained = train(model, dataset, _images_of(plan, "validation", part), settings)
    if rank is not None:
        network.module = network.module.merge_and_unload()  # type: ignore[operator]  # a method that peft added
    network.module.eval()
    return trained


def prepare_training(
    request: TrainingRequest,
    config: Config,
    work: Path,
    *,
    created: str,
    load_encoder: LoadEncoder | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Find, split and decode the images, evaluate the baseline, and write the plan; raise as ``run_finetuning``."""
    layout, recipe = request.layout, request.recipe
    find_base(request.base, cache_dir=config.cache_dir)  # fails before minutes of reading
    known, strangers = data.find_candidates(layout, request.source, config.state_dir)
    known += data.candidates_of(request.images)
    resources = Resources(config, load_encoder=load_encoder)
    try:
        embedder, _, _ = resources.load()
        photos = data.gather(known, strangers, embedder)
        tell("reading images")
        split = data.split_photos(photos, recipe)
        baselines = baseline_predictions(photos, split, embedder, layout, config.dataset(layout.name).prompts)
    finally:
        resources.unload()
    tell("evaluating the prototypes")
    base = load_base(request.base, photos.labels, cache_dir=config.cache_dir, side=request.side)
    plan = data.Plan(
        work=work,
        dataset=layout.name,
        labels=photos.labels,
        base=base.name,
        side=request.side,
        recipe=replace(recipe, learning_rate=recipe.learning_rate or base.learning_rate),
        extra=request.extra,
        created=created,
        decoding=config.decoding.jpeg,
        preprocessing=base.preprocessing,
        source=enlarged(base.preprocessing),
        data=_described(photos, split, request),
        classes={part: photos.classes[split[part]] for part in data.PARTS},
        weights=photos.weights[split["train"]].astype(np.float32),
        baselines=baselines,
    )
    for part in data.PARTS:
        files = [photos.files[index] for index in split[part]]
        _decode(files, plan.size_of(part), config, data.pixels_file(work, part))
    _decode(photos.stranger_files, plan.preprocessing, config, data.pixels_file(work, "strangers"))
    tell("decoding images")
    plan.write()


def enlarged(seen: Preprocessing) -> Preprocessing:
    """Return the size of the stored training images."""
    edge, height, width = (round(LARGER * side) for side in (seen.shortest_edge, seen.crop_height, seen.crop_width))
    return replace(seen, shortest_edge=max(edge, height, width), crop_height=height, crop_width=width)


def _decode(files: Sequence[data.ImageFile], size: Preprocessing, config: Config, target: Path) -> None:
    """Decode images into one file of pixels in the given order."""
    said = config.decoding
    limits = DecodeLimits.of(said)
    workers = said.workers or max(1, min(8, os.cpu_count() or 1))
    places = {file: index for index, file in enumerate(files)}
    each = size.crop_height * size.crop_width * 3
    with data.disk_errors_translated(target.parent), open(target, "wb") as file:
        if not files:
            return
        with DecoderPool(workers, size, limits, timeout_seconds=said.timeout_seconds, jpeg=said.jpeg) as pool:
            for answer in pool.decode_all(files):
                if not isinstance(answer, DecodedImage):
                    raise DataError(f"{answer.path} can no longer be read: {answer.message}; run the command again")
                file.seek(places[answer.path, answer.stamp] * each)
                file.write(answer.pixels.tobytes())


def _described(photos: data.Photos, split: data.Split, request: TrainingRequest) -> dict[str, Any]:
    """Return counts, left-out files and notes as plain values."""
    rows: list[dict[str, Any]] = [{"label": label, "images": number} for label, number in photos.counts.items()]
    for part in data.PARTS:
        held = np.bincount(photos.classes[split[part]], minlength=len(rows))
        for row, number in zip(rows, held.tolist(), strict=True):
            row[part] = number
    return {
        "source": request.source.value,
        "images": len(photos.files),
        "filed": int((photos.weights != data.PLACED).sum()),
        "strangers": len(photos.stranger_files),
        "classes": rows,
        "left_out": list(photos.left_out),
        "notes": _notes(rows, request.layout),
    }


def _notes(rows: Sequence[dict[str, Any]], layout: Layout) -> list[str]:
    """Return notes on limits of the evaluation and on classes that prevent a promotion."""
    trained, in_clases = {row["label"] for row in rows}, set(class_labels(layout.area(Area.CLASES)))
    untested = [row["label"] for row in rows if not row["test"]]
    without, foreign, tests = sorted(in_clases - trained), sorted(trained - in_clases), sum(row["test"] for row in rows)
    notes = {
        "classes without test images, since they have too few different images: " + ", ".join(untested): untested,
        "classes without images, whose folders prevent a promotion of the model: " + ", ".join(without): without,
        "classes without a folder in Clases/, which prevents a promotion of the model: " + ", ".join(foreign): foreign,
        f"only {tests} test images: the metrics are imprecise": tests < FEWEST_TESTS,
    }
    return [note for note, applies in notes.items() if applies]
