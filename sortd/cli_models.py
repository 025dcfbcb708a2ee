"""The commands ``sortd models``, each of which imports its module when it runs, as those of ``cli`` do."""

from pathlib import Path
from typing import Annotated

import typer

from sortd.commands.console import Command, ConfigOption, DatasetOption, Group, JsonOption, load_config, show

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
