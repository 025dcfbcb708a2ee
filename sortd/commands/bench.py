"""The command ``bench``: how fast the user's own machine, model and images are, and what to change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sortd.commands.console import (
    ConfigOption,
    JsonOption,
    counted,
    load_config,
    megabytes,
    print_json,
    print_line,
    print_table,
    printable,
)

if TYPE_CHECKING:
    from sortd.commands.measurement import Backend, LoadOther, Measurement
    from sortd.daemon.resources import LoadEncoder

INT8 = "onnx-int8"
BACKENDS = (INT8, "onnx", "torch")
STEPS = 9
"""What the bar counts to: the stages, and the backends that are compared."""

WORTH_A_CHANGE = 1.1
"""Times the images per second from which another backend is worth a line."""


def bench(
    folder: Annotated[Path | None, typer.Argument(help="Whose images serve; without it those of the datasets.")] = None,
    config: ConfigOption = None,
    images: Annotated[int, typer.Option(min=4, max=10_000, help="How many images, at most.")] = 96,
    as_json: JsonOption = False,
) -> None:
    """Measure images per second and milliseconds by stage on this machine; moves no file, takes under a minute."""
    bench_with(folder, config, images=images, as_json=as_json)


def bench_with(
    folder: Path | None,
    config: Path | None,
    *,
    images: int,
    as_json: bool,
    load_encoder: "LoadEncoder | None" = None,
    load_other: "LoadOther | None" = None,
) -> None:
    """Measure; ``load_encoder`` and ``load_other`` stand in for the configured model.

    Raises:
        SortdError: what stands in the way.
    """
    from sortd.commands.measurement import measure

    loaded = load_config(config)
    with _bar() as tell:
        measured = measure(
            loaded,
            folder,
            images=images,
            others=BACKENDS,
            load_encoder=load_encoder,
            load_other=load_other,
            tell=tell,
        )
    if as_json:
        print_json(measured.facts() | {"advice": advice(measured)})
    else:
        _print(measured)


@contextmanager
def _bar() -> Iterator[Callable[[str], None]]:
    """Show on a terminal how far the measurement is; its stages are told as they begin."""
    import sys

    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        task = bar.add_task("", total=STEPS)

        def tell(stage: str) -> None:
            bar.update(task, description=stage, advance=1)

        yield tell


def advice(measured: "Measurement") -> list[str]:
    """Return what to change, the greatest gain first, as sentences."""
    return [*_backend_advice(measured), _limit_advice(measured)]


def _backend_advice(measured: "Measurement") -> "Iterator[str]":
    """Say which backend to choose: the quickest of those that may serve, and what keeps a quicker one from it."""
    serving = next(one for one in measured.backends if one.serves)

    def times(one: "Backend") -> float:
        return one.images_per_second / serving.images_per_second

    may_serve = [one for one in measured.backends if one.backend != INT8 or one.serves or not measured.int8_refusal]
    best = max(may_serve, key=times)
    name = best.backend.partition("-")[0]
    if times(best) < WORTH_A_CHANGE:
        yield f"keep the backend: {serving.backend} is as fast as any that may serve here"
    elif name == serving.backend.partition("-")[0]:  # the backend is right, its precision is found out at a start
        yield f"start sortd again: {best.backend} may serve, and could file {times(best):.1f} times as many images"
    else:
        yield f"set `backend: {name}`: {best.backend} could file {times(best):.1f} times as many images a second"
    quicker = [one for one in measured.backends if one not in may_serve and times(one) >= WORTH_A_CHANGE * times(best)]
    for one in quicker:
        yield f"{one.backend} could file {times(one):.1f} times as many, but does not serve: {measured.int8_refusal}"
    if measured.onnx_hint and serving.backend == "torch" and measured.device == "cpu":
        yield f"only torch is ready here; ONNX Runtime may be faster: {measured.onnx_hint}, then measure again"


def _limit_advice(measured: "Measurement") -> str:
    """Say what takes the larger share of the time, and what would help."""
    if measured.limit == "decode":
        return "decoding limits: more processor cores help, a faster model does not"
    if measured.device == "cpu":
        return "the model's forward limits: a faster backend, a smaller model or a GPU helps"
    return "the model's forward limits: a smaller model helps, more processor cores do not"


def _print(measured: "Measurement") -> None:
    stages = measured.stages
    print_line(
        f"{measured.filed_per_second:.1f} images a second on {measured.device}, {counted(measured.cores, 'core')}",
        style="bold green",
    )
    print_line(f"model: {printable(measured.model)}")
    share = measured.embedded_per_second / measured.bound_per_second
    print_line(
        f"decoding and encoding: {measured.embedded_per_second:.1f} a second, {share:.0%} of what forward and decoding"
        f" alone would allow ({measured.bound_per_second:.1f})"
    )
    print_line(f"measured on {counted(measured.files, 'image')} of {megabytes(measured.megabytes * 1e6)} on the mean")
    print_line("")
    rows = (
        ("read", stages.read, "from the disk"),
        ("decode", stages.decode, "one process; as many work as there are cores"),
        ("encode", stages.encode, f"at its best batch, {measured.best_batch}"),
        ("encode alone", stages.encode_alone, "one image by itself"),
        (
            "decide",
            stages.decide,
            "by the prototypes that serve" if stages.decide else "no prototypes of this model yet",
        ),
        ("move", stages.move, "copies in a scratch folder, journal and all"),
    )
    shown = [(name, "" if value is None else f"{value:.2f}", what) for name, value, what in rows]
    print_table(("stage", "ms an image", ""), shown, right=("ms an image",))
    print_line("")
    columns = ("ms an image", "at most a second")
    backends = [
        ("->" if one.serves else "", one.backend, f"{one.encode:.2f}", f"{one.images_per_second:.1f}")
        for one in measured.backends
    ]
    print_table(("", "backend", *columns), backends, right=columns)
    print_line("")
    for sentence in advice(measured):
        print_line(sentence)
