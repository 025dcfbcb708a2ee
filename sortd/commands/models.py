"""The commands about models: ``list``, ``fetch``, ``export``, ``promote`` and ``demote``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sortd.commands.console import (
    Command,
    ConfigOption,
    DatasetOption,
    Group,
    JsonOption,
    load_config,
    megabytes,
    print_json,
    print_line,
    print_table,
    printable,
    say,
    spinner,
)

_CLASSIFIERS = {"prototypes": "prototypes", "finetuned": "fine-tuned model"}

models = typer.Typer(
    name="models",
    cls=Group,
    help="List the models on this machine; fetch, export, promote and demote models.",
    invoke_without_command=True,
)


@models.callback()
def _models(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the models on this machine and those in use; fetch, export, promote and demote models."""
    if context.invoked_subcommand is None:
        list_models(config, as_json)


@models.command("list", cls=Command)
def list_models(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the models on this machine, the selected one and its backend, and the classifier of each dataset."""
    from sortd.commands.model_facts import backend_lines, model_list

    facts = model_list(load_config(config))
    if as_json:
        print_json(facts)
        return
    columns = ("name", "kind", "size", "content", "folder")
    rows = [
        (
            "->" * model["chosen"],
            *((model | {"size": megabytes(model["size_bytes"])})[column] or "" for column in columns),
        )
        for model in facts["models"]
    ]
    print_table(("", "model", "kind", "size", "content", "folder"), rows, right=("size",))
    print_line("")
    print_line(facts["why"], style="bold red" if facts["problem"] else "bold")
    for line in (*facts["advice"], *backend_lines(facts["backend"])):
        print_line(printable(line))
    if facts["running"]:
        print_line(f"The running sortd uses {facts['running']['model']}: {facts['running']['encoder_id']}")
    _print_finetuned(facts["datasets"])


def _print_finetuned(datasets: Mapping[str, Any]) -> None:
    """Print the classifier of each dataset, and its fine-tuned models."""
    from sortd.commands.status import share

    if not datasets:
        return
    print_line("")
    for name, facts in datasets.items():
        print_line(f"{printable(name)} is decided by the {_CLASSIFIERS[facts['deciding']]}", style="bold")
        if facts["refusal"]:
            print_line(f"  {printable(facts['refusal'])}", style="bold red")
    rows = [
        (
            "->" if one["serves"] else "promoted" if one["promoted"] else "",
            name,
            one.get("verdict") or "damaged",
            share(one.get("accuracy")),
            share(one.get("prototypes_accuracy")),
            one.get("images"),
            one.get("base"),
            one["folder"],
        )
        for name, facts in datasets.items()
        for one in facts["results"]
    ]
    if rows:
        columns = ("accuracy", "prototypes", "images")
        print_table(("", "dataset", "verdict", *columns, "base", "folder"), rows, right=columns)


@models.command("fetch", cls=Command)
def fetch_model(
    name: Annotated[str, typer.Argument(help="Name on the Hugging Face hub, for example clip-ViT-B-32.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into sortd's cache. Only this command uses the network."""
    from sortd.commands.model_facts import how_to_use
    from sortd.encoder.models import fetch

    loaded = load_config(config)
    say(f"sortd: fetching {name}")
    model = fetch(name, cache_dir=loaded.cache_dir)
    if as_json:
        print_json({"name": name, "folder": str(model.folder), "use": model.use.value})
        return
    print_line(f"{name} is in {model.folder}")
    print_line(how_to_use(name, model.use, loaded))


@models.command("export", cls=Command)
def export_model(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Export the model to ONNX Runtime and compare int8 with float32 on your references. Needs the extra onnx."""
    from sortd.commands.export import export
    from sortd.commands.model_facts import backend_facts, backend_lines

    loaded = load_config(config)
    with spinner("exporting the model") as on_progress:
        export(loaded, on_progress=on_progress)
    facts = backend_facts(loaded)
    if as_json:
        print_json(facts)
        return
    for line in backend_lines(facts):
        print_line(printable(line))


@models.command("promote", cls=Command)
def promote_model(
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
    from sortd.commands.promotion import promote
    from sortd.commands.status import share

    facts = promote(load_config(config), dataset, folder, force=force)
    if as_json:
        print_json(facts)
        return
    name, place = printable(facts["dataset"]), printable(facts["folder"])
    if facts["serves"]:
        print_line(f"{name} is decided by {place}", style="bold green")
    else:
        reason = "because of `classifier: prototypes` in the configuration; set auto"
        print_line(f"{place} is promoted in {name} but not used, {reason}", style="bold yellow")
    own, best = share(facts["accuracy"]), share(facts["prototypes_accuracy"])
    print_line(f"  {facts['verdict']}: accuracy {own} on {facts['images']} images, {best} by mode {facts['best_mode']}")
    say(f"sortd: {facts['told']}")


@models.command("demote", cls=Command)
def demote_model(config: ConfigOption = None, dataset: DatasetOption = None, as_json: JsonOption = False) -> None:
    """Use the prototypes for a dataset again. The folder of the fine-tuned model is kept."""
    from sortd.commands.promotion import demote

    facts = demote(load_config(config), dataset)
    if as_json:
        print_json(facts)
        return
    print_line(f"{printable(facts['dataset'])} is decided by the prototypes", style="bold")
    say(f"sortd: {facts['told'] or 'no model was promoted; nothing changed'}")
