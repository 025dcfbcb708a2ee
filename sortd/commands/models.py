"""The commands about models: which are here, ``fetch``, which alone downloads, ``promote`` and ``demote``."""

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

SAID = {"prototypes": "prototypes", "finetuned": "fine-tuned model"}

models = typer.Typer(
    name="models",
    cls=Group,
    help="Show which models are here and which decide; fetch, promote and demote.",
    invoke_without_command=True,
)


@models.callback()
def _models(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show which models are here and which are used; `fetch` gets another, `promote` lets a fine-tuned one decide."""
    if context.invoked_subcommand is None:
        list_models(config, as_json)


@models.command("list", cls=Command)
def list_models(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show which models are here, which one `model: auto` takes and why, and which classifier decides each dataset."""
    from sortd.commands.model_facts import backend_lines, model_list

    facts = model_list(load_config(config))
    if as_json:
        print_json(facts)
        return
    rows = [
        (
            "->" if one["chosen"] else "",
            one["name"],
            one["kind"],
            megabytes(one["size_bytes"]),
            one["content"] or "",
            one["folder"],
        )
        for one in facts["models"]
    ]
    print_table(("", "model", "kind", "size", "content", "folder"), rows, right=("size",))
    print_line("")
    print_line(facts["why"], style="bold red" if facts["problem"] else "bold")
    for line in (*facts["advice"], *backend_lines(facts["backend"])):
        print_line(printable(line))
    if facts["running"]:
        print_line(f"The sortd that runs now uses {facts['running']['model']}: {facts['running']['encoder_id']}")
    _print_finetuned(facts["datasets"])


def _print_finetuned(datasets: Mapping[str, Any]) -> None:
    """Print each dataset's classifier, and the fine-tuned models that it could have."""
    from sortd.commands.promotion import share

    if not datasets:
        return
    print_line("")
    for name, facts in datasets.items():
        print_line(f"{printable(name)} is decided by the {SAID[facts['deciding']]}", style="bold")
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
        columns = ("right", "prototypes", "of")
        print_table(("", "dataset", "verdict", *columns, "base", "folder"), rows, right=columns)


@models.command("fetch", cls=Command)
def fetch_model(
    name: Annotated[str, typer.Argument(help="As the Hugging Face hub has it: clip-ViT-B-32.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into sortd's cache: the only thing in sortd that uses the network."""
    from sortd.commands.model_facts import how_to_use
    from sortd.encoder.models import fetch, use_of

    loaded = load_config(config)
    say(f"sortd: fetching {name}")
    folder = fetch(name, cache_dir=loaded.cache_dir)
    use = use_of(name, folder)
    if as_json:
        print_json({"name": name, "folder": str(folder), "use": use.value})
        return
    print_line(f"{name} is in {folder}")
    print_line(how_to_use(name, use, loaded))


@models.command("export", cls=Command)
def export_model(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Write the configured model for ONNX Runtime, and hold int8 against your references; needs the extra onnx."""
    from sortd.commands.export import export
    from sortd.commands.model_facts import backend_facts, backend_lines

    loaded = load_config(config)
    with spinner("exporting the model") as tell:
        export(loaded, tell=tell)
    facts = backend_facts(loaded)
    if as_json:
        print_json(facts)
        return
    for line in backend_lines(facts):
        print_line(printable(line))


@models.command("promote", cls=Command)
def promote_model(
    folder: Annotated[
        Path | None, typer.Argument(help="What `sortd finetune` wrote; without it the newest of the dataset.")
    ] = None,
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also where it is weaker than the prototypes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a fine-tuned model decide a dataset's images; the sortd that runs takes it up at once."""
    from sortd.commands.promotion import promote, share

    facts = promote(load_config(config), dataset, folder, force=force)
    if as_json:
        print_json(facts)
        return
    name, place = printable(facts["dataset"]), printable(facts["folder"])
    if facts["serves"]:
        print_line(f"{name} is decided by {place}", style="bold green")
    else:
        kept = "`classifier: prototypes` in the configuration keeps it from deciding, set auto"
        print_line(f"{place} is promoted in {name}, but {kept}", style="bold yellow")
    right, other = share(facts["accuracy"]), share(facts["prototypes_accuracy"])
    print_line(f"  {facts['verdict']}: of {facts['images']} images {right} right, {other} by mode {facts['best_mode']}")
    say(f"sortd: {facts['told']}")


@models.command("demote", cls=Command)
def demote_model(config: ConfigOption = None, dataset: DatasetOption = None, as_json: JsonOption = False) -> None:
    """Let the prototypes decide a dataset's images again; the fine-tuned model's folder stays where it is."""
    from sortd.commands.promotion import demote

    facts = demote(load_config(config), dataset)
    if as_json:
        print_json(facts)
        return
    print_line(f"{printable(facts['dataset'])} is decided by the prototypes", style="bold")
    say(f"sortd: {facts['told'] or 'no model was promoted; nothing changed'}")
