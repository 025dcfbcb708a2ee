"""The commands about models, each of which imports its module when it runs: ``models``, ``encode`` and ``finetune``."""

import os
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sortd.bulk import require_bulk_packages
from sortd.commands.console import Command, ConfigOption, DatasetOption, Group, JsonOption, load_config, show
from sortd.finetune.recipe import Effort, LabelSource, Recipe, Source, TrainingRequest

OPENBLAS_SPIN = ("OPENBLAS_THREAD_TIMEOUT", "20")
"""Binary logarithm of the cycles that OpenBLAS threads spin after a product (default 26). Spinning took 3 ms of
processor time per image, with this value 0.1 ms (`benchmarks.efficiency`, two cores)."""

RECIPE = Recipe()  # the defaults of a fine-tuning

models = typer.Typer(name="models", cls=Group, invoke_without_command=True)


@models.callback()
def list_models_by_default(
    context: typer.Context,
    config: ConfigOption = None,
    is_available: Annotated[bool, typer.Option("--available", help="List published models that sortd reads.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the models on this machine and those in use; fetch, convert, export, promote and demote models."""
    if is_available:
        from sortd.commands.models import print_published, published_list

        show(published_list(load_config(config)), print_published, as_json=as_json)
    elif context.invoked_subcommand is None:
        list_models(config, as_json)


@models.command("list", cls=Command)
def list_models(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the models on this machine, the selected one and its backend, and the classifier of each dataset."""
    from sortd.commands.models import model_list, print_models

    show(model_list(load_config(config)), print_models, as_json=as_json)


@models.command("fetch", cls=Command)
def fetch_command(
    name: Annotated[str, typer.Argument(help="Name on the Hugging Face hub, for example clip-ViT-B-32.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into sortd's cache. Only this command uses the network."""
    from sortd.commands.models import fetch_model

    fetch_model(load_config(config), name, as_json=as_json)


@models.command("convert", cls=Command)
def convert_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a model whose weights are pytorch_model.bin.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model's pickled weights to safetensors, once. Tensors are read, nothing else, and without network."""
    from sortd.commands.models import convert_model

    convert_model(load_config(config), folder.expanduser().absolute(), as_json=as_json)


@models.command("export", cls=Command)
def export_command(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Export the model to ONNX Runtime and compare int8 with float32 on your references. Needs the extra onnx."""
    from sortd.commands.models import export_model

    export_model(load_config(config), as_json=as_json)


@models.command("promote", cls=Command)
def promote(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder that `sortd finetune` wrote. Default: the newest of the dataset.")
    ] = None,
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote it even if it is weaker than the prototypes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Use a fine-tuned model for a dataset. A running sortd switches to it at once."""
    from sortd.commands.finetuning import print_promoted, promote_model

    show(promote_model(load_config(config), dataset, folder, force=force), print_promoted, as_json=as_json)


@models.command("demote", cls=Command)
def demote(config: ConfigOption = None, dataset: DatasetOption = None, as_json: JsonOption = False) -> None:
    """Use the prototypes for a dataset again. The folder of the fine-tuned model is kept."""
    from sortd.commands.finetuning import demote_model, print_demoted

    show(demote_model(load_config(config), dataset), print_demoted, as_json=as_json)


@models.command("prune", cls=Command)
def prune(
    config: ConfigOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove them. Default: only list them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the exports in sortd's cache whose model is gone, with their sizes, and remove them."""
    from sortd.commands.models_prune import prune_models

    prune_models(load_config(config), apply=apply, as_json=as_json)


def encode(
    config: ConfigOption = None,
    socket: Annotated[Path | None, typer.Option(help="Path of the Unix socket. Default: that of `backend:`.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Group whose members can connect. Default: only this user can.")
    ] = None,
    metrics: Annotated[Path | None, typer.Option(help="Write metrics for Prometheus to this file, NAME.prom.")] = None,
) -> None:
    """Serve the model to other sortd processes of this machine, which have `backend: socket:PATH`."""
    os.environ.setdefault(*OPENBLAS_SPIN)
    from sortd.commands.encode import serve_encoder

    serve_encoder(load_config(config), socket=socket, group=group, textfile=metrics)


def finetune(  # noqa: PLR0913, PLR0917 -- a command's options are its parameters
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    source: Annotated[Source, typer.Option("--from", help="Folders to train on.")] = Source.CLASES,
    base: Annotated[
        str, typer.Option(help="auto, packaged, or the name or folder of a transformers image model.")
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Result folder. Default: a new one in the state folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the newest unfinished training.")] = False,
    effort: Annotated[
        Effort, typer.Option(help="quick and standard train the last blocks of the network, thorough all.")
    ] = Effort.THOROUGH,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 20, or more for at least 300 steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = RECIPE.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Peak learning rate. Default: the base's.")
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Factor of the learning rate per layer.")
    ] = RECIPE.layer_decay,
    balance: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of rare classes; 0: images have equal weight, 1: classes.")
    ] = RECIPE.balance,
    test: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of test images.")] = RECIPE.test,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of validation images.")
    ] = RECIPE.validation,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the split and the training.")] = RECIPE.seed,
    side: Annotated[int | None, typer.Option(min=16, help="Input size in pixels. Default: the base's.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train LoRA layers of this rank (needs peft).")] = None,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Also train on mirrored images.")] = True,
    manifest: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Also train on the images of this run of `sortd bulk`.")
    ] = None,
    labels: Annotated[
        LabelSource, typer.Option(help="Classes of the images of --manifest: as decided, or their folders' names.")
    ] = LabelSource.DECISIONS,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together on this machine.")] = 1,
    extra: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers' TrainingArguments; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an image model on a dataset, and compare it with the prototypes."""
    from sortd.commands.finetuning import (
        fine_tune,
        is_first_process,
        is_launched,
        launch_training,
        require_training_packages,
    )
    from sortd.commands.status import dataset_named

    require_training_packages()
    loaded = load_config(config)
    layout = dataset_named(loaded, dataset)
    recipe = replace(
        effort.recipe,
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
    options = [f"--dataset {shlex.quote(layout.name)}"]
    options += [f"--config {config}"] * (config is not None) + [f"--output {output}"] * (output is not None)
    options += [f"--processes {processes}"] * (processes > 1)
    request = TrainingRequest(layout, source, base, side, recipe, tuple(extra or ()))
    if processes > 1 and not is_launched():
        launch_training(loaded, request, processes, output=output, resume=resume)
    with ExitStack() as stack:
        if manifest is not None and not resume and is_first_process():
            require_bulk_packages()
            from sortd.bulk.labelled import training_images

            images = stack.enter_context(training_images(manifest.absolute(), labels, loaded))
            request = replace(request, images=images)
        fine_tune(
            loaded,
            request,
            output=output,
            resume=resume,
            resume_command=" ".join(["sortd finetune", *options, "--resume"]),
            as_json=as_json,
        )
