"""`python -m training.train`: trains the small CLIP and writes the exported folder. See README.md."""

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from training import checkpoint, schedule
from training.augmentation import Augmenter
from training.captions import Captioner
from training.checkpoint import Standing
from training.crew import Crew, Place, thread_count
from training.data import Batch, Library, Shuffler, read_library
from training.evaluate import measure
from training.export import export
from training.journal import Journal
from training.loss import classify, contrast
from training.made_up import write_made_up
from training.model import Student, describe
from training.muon import Muon
from training.settings import Settings, preset
from training.tokens import learn_tokenizer, read_tokenizer

log = logging.getLogger("training")

TOKENIZER = "tokenizer"
"""Folder in a run; trained once, since all processes and resumed runs must number the pieces equally."""

EmbedImages = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
EmbedTexts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

REPORT_SECONDS = 30.0
MATRIX = 2
"""Parameters of at least so many dimensions have weight decay."""


class Run:
    """One training run: its model, average and progress."""

    def __init__(
        self,
        settings: Settings,
        library: Library,
        folder: Path,
        place: Place,
        *,
        device: torch.device,
        half: bool,
        start: Path | None = None,
    ) -> None:
        """Build everything from the seed, then resume from the folder's checkpoint, if any."""
        torch.manual_seed(settings.seed)
        self.settings, self.library, self.folder, self.device, self.half = settings, library, folder, device, half
        sizes = settings.architecture
        self.tokenizer = read_tokenizer(folder / TOKENIZER)
        self.captioner = Captioner(library.vocabulary, self.tokenizer, tokens=sizes.text_tokens)
        configuration = describe(sizes, vocabulary=len(self.tokenizer))
        self.student = Student(configuration, concepts=len(library.vocabulary.concepts)).to(device)
        self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types only the other forms.
        self.average = copy.deepcopy(self.student).requires_grad_(requires_grad=False).eval()
        self.shuffler = Shuffler(
            library, batch=settings.batch, seed=settings.seed, includes_held_out=settings.includes_held_out
        )
        self.augmenter = Augmenter(device)
        self.optimizers = make_optimizers(self.student, settings)
        self.crew = Crew(place, list(self.student.parameters()))
        self.allowed = allowed_concepts(library).to(device)
        self.journal = Journal(folder)
        self.progress = Standing()
        self.met = 0.0
        steps = max(1, round(settings.epochs * self.shuffler.steps_per_epoch))
        budget = None if settings.budget_minutes is None else settings.budget_minutes * 60
        self.clock = schedule.Clock(steps, budget)
        self.resume(start)

    def resume(self, start: Path | None) -> None:
        """Resume from the checkpoint, if there is one; otherwise load the average of the run `start`, if given.

        An exported folder has no classifiers and no statistics of the neck, which are folded into the pooler: the
        classifiers then begin at random, and the neck as the identity.
        """
        saved = checkpoint.load(self.folder)
        if saved is None:
            if start is not None:
                average = self.student.state_dict() | checkpoint.load_average(start)
                self.student.load_state_dict(average)
                self.average.load_state_dict(average)
            return
        self.student.load_state_dict(saved.weights)
        self.average.load_state_dict(saved.average)
        for optimizer, state in zip(self.optimizers, saved.optimizers, strict=True):
            optimizer.load_state_dict(state)
        self.progress = saved.progress
        log.info("resumed at step %d", saved.progress.step)

    def save(self) -> None:
        """Write the checkpoint."""
        checkpoint.save(
            self.folder,
            self.progress,
            weights=self.student.state_dict(),
            average=self.average.state_dict(),
            optimizers=self.optimizers,
        )

    def share(self) -> float:
        """Return the progress of the run, 0 to 1."""
        return self.clock.share(self.progress.step, self.progress.seconds)

    def train(self) -> None:
        """Train until the schedule ends."""
        settings = self.settings
        embed_images, embed_texts = self.towers()
        bar = progress_bar()
        task = bar.add_task("training", total=1.0)
        bar.start()
        last_saved = last_measured = last_told = self.met = time.monotonic()
        told_step, parts = self.progress.step, []
        for batch in self.shuffler.batches(self.progress.step):
            share = self.share()
            if share >= 1:
                break
            parts.append(self.step(self.crew.share_of(batch), share, embed_images, embed_texts))
            now = time.monotonic()
            bar.update(task, completed=self.share())
            if self.crew.rank:
                parts.clear()
                continue
            if self.progress.step == 1 or now - last_told >= REPORT_SECONDS:
                speed = (self.progress.step - told_step) * settings.batch / (now - last_told)
                self.tell(torch.stack(parts).mean(dim=0).tolist(), share, speed)
                last_told, told_step, parts = now, self.progress.step, []
            if now - last_saved >= 60 * settings.checkpoint_minutes:
                self.save()
                last_saved = time.monotonic()
            if now - last_measured >= 60 * settings.evaluate_minutes:
                self.measure(at_most=1000)
                last_measured = time.monotonic()
        bar.stop()
        self.crew.leave()
        if not self.crew.rank:
            self.save()
            self.measure(at_most=100_000)

    def towers(self) -> tuple[EmbedImages, EmbedTexts]:
        """Return both towers, compiled if so configured."""
        if not self.settings.compile_towers:
            return self.student.embed_images, self.student.embed_texts
        return torch.compile(self.student.embed_images, dynamic=False), torch.compile(
            self.student.embed_texts, dynamic=False
        )

    def step(self, batch: Batch, share: float, embed_images: EmbedImages, embed_texts: EmbedTexts) -> torch.Tensor:
        """Take one step; return the four parts of the loss, float32 (4,)."""
        settings, student, number = self.settings, self.student, self.progress.step
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = schedule.rate(settings, share) * group["factor"]
        seed = (settings.seed * 1_000_003 + number) * self.crew.size + self.crew.rank
        side = schedule.side(settings, share)
        views = self.augmenter.views(
            batch.pixels.to(self.device), side=side, strength=schedule.strength(settings, share), seed=seed
        )
        captions = self.captioner.draw(
            batch.concepts, count=max(settings.texts // self.crew.size, len(batch.concepts)), seed=seed
        )
        place_of = torch.full((len(self.library.vocabulary.concepts),), -1)
        place_of[captions.concepts] = torch.arange(len(captions.concepts))
        concepts, sources = batch.concepts.to(self.device), batch.sources.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            images, maps = embed_images(views)
            texts = embed_texts(captions.tokens.to(self.device), captions.mask.to(self.device))
        images, maps, texts = images.float(), maps.float(), texts.float()
        to_text, of_text = contrast(images, texts, student.scale, place_of[batch.concepts].to(self.device))
        named = classify(student.classifier(images), concepts, self.allowed[sources])
        mapped = classify(student.map_classifier(maps), concepts, self.allowed[sources])
        loss = to_text + of_text + settings.head_weight * (named + mapped)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped.
        now = time.monotonic()
        seconds = self.crew.meet(self.progress.seconds + now - self.met)
        self.met = now
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress = replace(self.progress, step=number + 1, seconds=seconds)
        if self.progress.step % settings.average_every == 0:
            self.update_average()
        return torch.stack([to_text.detach(), of_text.detach(), named.detach(), mapped.detach()])

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the moving average of the weights and statistics."""
        towards = 1 - schedule.averaging(self.settings, self.progress.updates)
        pairs = zip(self.average.state_dict().values(), self.student.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            if mine.is_floating_point():
                mine.lerp_(theirs, towards)
            else:
                mine.copy_(theirs)
        self.progress = replace(self.progress, updates=self.progress.updates + 1)

    def tell(self, losses: list[float], share: float, images_per_second: float) -> None:
        """Log the progress."""
        names = ("loss_image_to_text", "loss_text_to_image", "loss_classifier", "loss_map_classifier")
        facts = {name: round(value, 4) for name, value in zip(names, losses, strict=True)}
        epoch = self.progress.step / self.shuffler.steps_per_epoch
        speed = round(images_per_second, 1)
        scale = round(self.student.scale.item(), 2)
        log.info("share %.3f epoch %.2f %s scale %.1f %.0f images/s", share, epoch, facts, scale, speed)
        self.journal.write(
            share=round(share, 5),
            step=self.progress.step,
            epoch=round(epoch, 3),
            images_per_second=speed,
            scale=scale,
            **facts,
        )

    def measure(self, *, at_most: int) -> None:
        """Measure the average on held-out images and log it."""
        figures = measure(
            self.average, self.library, self.captioner, device=self.device, half=self.half, at_most=at_most
        ).flat()
        log.info("held out: %s", figures)
        self.journal.write(share=round(self.share(), 5), step=self.progress.step, **figures)


def progress_bar() -> Progress:
    """Return a progress bar, which is shown on a terminal only."""
    console = Console(stderr=True)
    return Progress(
        BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def make_optimizers(student: Student, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for inner matrices and kernels, and AdamW for embeddings, norms and classifiers.

    The output of a batch norm does not depend on the scale of the convolution before it, so kernels take a higher
    learning rate than linear layers.
    """
    groups: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        table = name.endswith(("cls_token", "position_embeddings")) or "_embeddings.weight" in name
        decays = parameter.ndim >= MATRIX and not table
        inside = decays and "classifier" not in name
        groups.setdefault((inside, "backbone" in name, decays), []).append(parameter)
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (inside, convolves, decays), parameters in groups.items():
        factor = (settings.kernel_rate_factor if convolves else settings.matrix_rate_factor) if inside else 1.0
        decay = settings.weight_decay if decays else 0.0
        rows[inside].append({"params": parameters, "factor": factor, "weight_decay": decay})
    return [
        Muon(rows[True], lr=settings.peak_rate),
        torch.optim.AdamW(rows[False], lr=settings.peak_rate, betas=(0.9, 0.98), fused=True),
    ]


def allowed_concepts(library: Library) -> torch.Tensor:
    """Return which concepts each data set names, bool (data sets, concepts)."""
    allowed = torch.zeros(len(library.data_sets()), len(library.vocabulary.concepts), dtype=torch.bool)
    for row, data_set in enumerate(library.data_sets()):
        named = [concept for concept in library.vocabulary.of_label[data_set] if concept >= 0]
        allowed[row, named] = True
    return allowed


def arguments(values: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of *.npz and class_names.json")
    parser.add_argument("--run", type=Path, help="folder of checkpoints and curves; an existing run is resumed")
    parser.add_argument("--output", type=Path, help="folder to which the model is written at the end")
    parser.add_argument("--preset", choices=["cpu", "gpu", "smoke"], default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--amp", choices=["bf16", "off"], default="bf16", help="bfloat16 where it is safe, or float32 only"
    )
    parser.add_argument("--minutes", type=float, help="length of the schedule in minutes of training")
    parser.add_argument(
        "--epochs", type=float, help="length of the schedule in epochs; without --minutes the run is reproducible"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="RUN",
        help="start with the weights of that run, or of that exported folder (a warm restart)",
    )
    parser.add_argument("--peak-rate", type=float, help="peak learning rate; default: the preset's")
    parser.add_argument("--all-images", action="store_true", help="train on held-out images, too")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile, which needs a C++ compiler"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes that share each batch")
    parser.add_argument(
        "--export-only", action="store_true", help="export the average of the run's checkpoint and exit"
    )
    parser.add_argument("--smoke", action="store_true", help="train a tiny model on synthetic data in a minute")
    return parser.parse_args(values)


def chosen_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of the command line."""
    settings = replace(
        preset("smoke" if options.smoke else options.preset), seed=options.seed, includes_held_out=options.all_images
    )
    if options.peak_rate is not None:
        settings = replace(settings, peak_rate=options.peak_rate)
    if options.epochs is not None:
        settings = replace(settings, epochs=options.epochs, budget_minutes=None)
    if options.minutes is not None:
        settings = replace(settings, budget_minutes=options.minutes)
    return replace(settings, compile_towers=settings.compile_towers and not options.no_compile)


def work(rank: int, options: argparse.Namespace, data: Path, run_folder: Path, meeting: Path) -> None:
    """Train in one process; the first also reports, saves and exports."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if options.processes > 1:
        torch.set_num_threads(thread_count(options.processes))
    settings = chosen_settings(options)
    library = read_library(data, run_folder / "decoded")
    place = Place(rank, options.processes, meeting)
    run = Run(
        settings,
        library,
        run_folder,
        place,
        device=torch.device(options.device),
        half=options.amp == "bf16",
        start=options.start_from,
    )
    if not options.export_only:
        run.train()
    if rank == 0:
        run.journal.draw(run_folder / "curves.png")
        export(run.average, run.tokenizer, options.output, image_pixels=settings.architecture.image_pixels)
        log.info("wrote %s", options.output)


def prepare(settings: Settings, data: Path, run_folder: Path, start: Path | None) -> None:
    """Decode the images, and train the tokenizer or take that of `start`, unless an earlier run did."""
    library = read_library(data, run_folder / "decoded")
    if not (run_folder / TOKENIZER).exists():
        if start is not None:
            earlier = start / TOKENIZER if (start / TOKENIZER).exists() else start
            read_tokenizer(earlier).save_pretrained(run_folder / TOKENIZER)
            return
        sizes = settings.architecture
        tokenizer = learn_tokenizer(library.vocabulary, pieces=sizes.vocabulary, longest=sizes.text_tokens)
        tokenizer.save_pretrained(run_folder / TOKENIZER)


def main(values: list[str] | None = None) -> int:
    """Train, measure and export."""
    options = arguments(values)
    if not options.output or not (options.smoke or options.data):
        sys.stderr.write("give --output, and --data or --smoke\n")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        run_folder = options.run or Path(scratch) / "run"
        run_folder.mkdir(parents=True, exist_ok=True)
        data = write_made_up(Path(scratch) / "data") if options.smoke else options.data
        prepare(chosen_settings(options), data, run_folder, options.start_from)
        meeting = Path(scratch)
        spawn = torch.multiprocessing.get_context("spawn")
        others = [
            spawn.Process(target=work, args=(rank, options, data, run_folder, meeting))
            for rank in range(1, options.processes)
        ]
        for other in others:
            other.start()
        work(0, options, data, run_folder, meeting)
        for other in others:
            other.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
