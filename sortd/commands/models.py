"""The commands about models: which are here, which one is used and why, and ``fetch``, which alone downloads."""

from typing import Annotated

import typer

from sortd.commands.console import (
    ConfigOption,
    JsonOption,
    load_config,
    megabytes,
    print_json,
    print_line,
    print_table,
    say,
)

models = typer.Typer(name="models", help="Show which models are here, and fetch others.", invoke_without_command=True)


@models.callback()
def _models(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show which models are here and which one is used; `fetch` gets another."""
    if context.invoked_subcommand is None:
        list_models(config, as_json)


@models.command("list")
def list_models(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show which models are here, and which one `model: auto` takes and why."""
    from sortd.commands.model_list import model_list

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
    for line in facts["advice"]:
        print_line(line)
    if facts["running"]:
        print_line(f"The sortd that runs now uses {facts['running']['model']}: {facts['running']['encoder_id']}")


@models.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="As the Hugging Face hub has it: clip-ViT-B-32.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into sortd's cache: the only thing in sortd that uses the network."""
    from sortd.encoding.model_folders import STRONGER
    from sortd.encoding.models import fetch

    loaded = load_config(config)
    say(f"sortd: fetching {name}")
    folder = fetch(name, cache_dir=loaded.cache_dir)
    if as_json:
        print_json({"name": name, "folder": str(folder)})
        return
    print_line(f"{name} is in {folder}")
    if loaded.model == "auto" and name == STRONGER:
        print_line("`model: auto` takes it from the next start on")
    elif loaded.model != name:
        print_line(f"to use it: `model: {name}` in the configuration, and start sortd again")
