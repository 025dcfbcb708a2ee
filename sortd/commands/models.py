"""The models on this machine: the commands ``models list``, ``fetch``, ``convert``, ``export``, and what they print."""

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sortd.classify.proportions import estimated
from sortd.commands.console import megabytes, print_line, print_table, printable, say, show, spinner
from sortd.commands.precision import judge_int8
from sortd.commands.status import list_finetuned_models
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.backends import choose_backend, connect
from sortd.encoder.export import Progress, make_exports
from sortd.encoder.fetch import fetch
from sortd.encoder.models import STRONGER, ModelFolder, Use, locate_configured
from sortd.encoder.onnx_encoder import Exports, Precision, find_exports, is_installed, read_verdict, write_verdict
from sortd.encoder.pickles import convert_folder
from sortd.encoder.published import CLIP_OF, PUBLISHED
from sortd.errors import ConfigError, ModelError
from sortd.service import read_status

CONTENT_DIGITS = 16  # of the sha256 over configuration and weights; enough to distinguish models
EXPORT_MISSING = "the export to ONNX is missing, damaged or outdated"
_CLASSIFIERS = {"prototypes": "prototypes", "finetuned": "fine-tuned model"}


def print_models(facts: Mapping[str, Any]) -> None:
    """Print ``model_list``: the models, the selected one and its backend, and the classifier of each dataset."""
    rows = [
        ("->" * one["chosen"], one["name"], one["kind"], megabytes(one["size_bytes"]), one["content"], one["folder"])
        for one in facts["models"]
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
            estimated(one.get("accuracy"), one.get("images") or 0),
            estimated(one.get("prototypes_accuracy"), one.get("images") or 0),
            one.get("base"),
            one["folder"],
        )
        for name, facts in datasets.items()
        for one in facts["results"]
    ]
    if rows:
        columns = ("accuracy", "prototypes")
        print_table(("", "dataset", "verdict", *columns, "base", "folder"), rows, right=columns)


def published_list(config: Config) -> dict[str, Any]:
    """Return the published models that sortd reads, and which are on this machine, as plain values."""
    here = {model.name for model in models.available(cache_dir=config.cache_dir)}
    return {
        "models": [asdict(model) | {"is_here": model.name in here} for model in PUBLISHED],
        "text_models": {clip: words for words, clip in CLIP_OF.items()},
    }


def print_published(facts: Mapping[str, Any]) -> None:
    """Print ``published_list``."""
    columns = ("name", "megabytes", "speed", "reads", "licence", "published")
    rows = [("here" * model["is_here"], *(str(model[column]) for column in columns)) for model in facts["models"]]
    right = ("MB", "speed")
    print_table(("", "model", *right, "class names", "licence", "published by its authors"), rows, right=right)
    print_line("")
    print_line("speed: images a second on a CPU, relative to clip-ViT-B-32; docs/models.md has the sources.")
    for name, text_model in facts["text_models"].items():
        print_line(f"class names in more than 50 languages: `model: {name}` with `text_model: {text_model}`")
    print_line("To get one, with network access: sortd models fetch NAME")


def fetch_model(config: Config, name: str, *, as_json: bool) -> None:
    """Download a model into sortd's cache, and print what it is for."""
    say(f"sortd: fetching {name}")
    model = fetch(name, cache_dir=config.cache_dir)

    def render(facts: Mapping[str, Any]) -> None:
        print_line(f"{name} is in {facts['folder']}")
        print_line(how_to_use(name, model.use, config))

    show({"name": name, "folder": str(model.folder), "use": model.use.value}, render, as_json=as_json)


def convert_model(config: Config, folder: Path, *, as_json: bool) -> None:
    """Convert the pickled weights of a folder to safetensors, and print what the model is for."""
    say(f"sortd: converting {folder}")
    written = convert_folder(str(folder), folder)
    model = models.verify_folder(str(folder), folder)

    def render(facts: Mapping[str, Any]) -> None:
        print_line(f"wrote {', '.join(facts['written'])}" if written else "it has weights in safetensors already")
        print_line(how_to_use(str(folder), model.use, config))

    show({"folder": str(folder), "written": [str(path) for path in written]}, render, as_json=as_json)


def export_model(config: Config, *, as_json: bool) -> None:
    """Export the model to ONNX Runtime, compare int8 with float32, and print the backend."""
    with spinner("exporting the model") as on_progress:
        export(config, on_progress=on_progress)
    show(backend_facts(config), print_backend, as_json=as_json)


def print_backend(facts: Mapping[str, Any]) -> None:
    """Print ``backend_facts``."""
    for line in backend_lines(facts):
        print_line(printable(line))


def model_list(config: Config) -> dict[str, Any]:
    """Return the models as plain values; nothing is loaded or downloaded."""
    found = {model.folder: model for model in models.available(cache_dir=config.cache_dir)}
    problem, chosen = None, None
    try:
        if config.encoder_socket is None:
            chosen = models.locate_clip(config.model, cache_dir=config.cache_dir)
            found.setdefault(chosen.folder, chosen)
    except ModelError as refusal:
        problem = str(refusal)
    status = read_status(config.state_dir)
    running = None
    if status is not None and status["alive"]:
        running = {"model": status.get("model"), "encoder_id": status.get("encoder_id")}
    why, advice = _why(config.model, chosen)
    if config.encoder_socket is not None:
        why, advice = f"`backend: {config.backend}` selects the model of the encoder service", []
    return {
        "model": config.model,
        "models": [
            _row(model, config) | {"chosen": chosen is not None and model.folder == chosen.folder}
            for model in found.values()
        ],
        "problem": problem,
        "why": problem or why,
        "advice": advice,
        "backend": backend_facts(config),
        "running": running,
        "datasets": list_finetuned_models(config),
    }


def _row(model: ModelFolder, config: Config) -> dict[str, Any]:
    content = None
    with suppress(OSError):
        content = models.digest(model, cache_dir=config.cache_dir)[:CONTENT_DIGITS]
    return {
        "name": model.name,
        "folder": str(model.folder),
        "kind": model.kind,
        "size_bytes": model.size_bytes,
        "content": content,
    }


def _why(wanted: str, chosen: ModelFolder | None) -> tuple[str, list[str]]:
    """Return why a model is selected, and how to get a better one."""
    if wanted != "auto" or chosen is None:
        return f"`model: {wanted}` is configured", []
    if chosen.name != "packaged":
        return f"`model: auto` selects {chosen.name}, which is on this machine and better than the packaged one", []
    return f"`model: auto` selects the packaged one, since {STRONGER} is not on this machine", [
        f"To get the better one, with network access: sortd models fetch {STRONGER}",
        "Without a network: copy its folder from another machine and set `model:` to its path",
    ]


def how_to_use(name: str, use: Use, config: Config) -> str:
    """Return in a sentence what a model on this machine is for, and how to configure it."""
    restart = "in the configuration, and restart sortd"
    match use:
        case Use.IMAGES:
            return (
                f"it takes images but no text: set `model: {name}` {restart}, to decide by references alone "
                f"(`mode: mixed` is then `best`); it can also be the base of a fine-tuned model: "
                f"`sortd finetune --dataset NAME --base {name}`"
            )
        case Use.WORDS if config.text_model == name:
            return "`text_model:` names it: sortd uses it for the class names after a restart"
        case Use.WORDS:
            return (
                f"it takes text but no images; beside the CLIP with which it was trained it can embed the class names: "
                f"set `text_model: {name}` {restart}"
            )
    if config.model == name or (config.model == "auto" and name == STRONGER):
        return f"`model: {config.model}` selects it after a restart of sortd"
    return f"to use it, set `model: {name}` {restart}"


def backend_facts(config: Config) -> dict[str, Any]:
    """Return the backend of the configured model as plain values; nothing is loaded or exported."""
    facts: dict[str, Any] = {
        "configured": config.backend,
        "name": None,
        "why": None,
        "problem": None,
        "is_installed": is_installed(),
        "export": None,
        "agreement": None,
    }
    if config.encoder_socket is not None:
        return facts | _service_facts(config, config.encoder_socket)
    try:
        model = locate_configured(config)
    except (ConfigError, ModelError):  # ``model_list`` and ``check`` report it
        return facts
    try:
        found = find_exports(model) if is_installed() else None
        if found is not None:
            facts |= {"export": _export_facts(found), "agreement": read_verdict(found, config.root)}
        chosen = choose_backend(config.backend, model, device=config.device)
        facts |= {"name": chosen.name, "why": chosen.why}
    except ModelError as refusal:
        facts["problem"] = str(refusal)
    return facts


def _service_facts(config: Config, path: Path) -> dict[str, Any]:
    """Return what the encoder service serves, or why it cannot be used, as ``backend_facts``."""
    try:
        with closing(connect(config, path)) as encoder:
            return {"name": "socket", "why": f"{path} serves {encoder.greeting.description}: {encoder.encoder_id}"}
    except (ConfigError, ModelError) as refusal:
        return {"problem": str(refusal)}


def _export_facts(found: Exports) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "size_bytes": found.size_bytes,
        "precisions": [one.value for one in found.precisions],
        "int8_gain": round(found.manifest.gain, 2),
        "made_with": dict(found.manifest.made_with),
    }


def backend_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``backend_facts`` as sentences."""
    if facts["problem"]:
        yield facts["problem"]
    if facts["name"] is None:
        return
    export = facts["export"]
    if facts["name"] == "onnx" and export is None:
        yield f"Backend: torch, since {EXPORT_MISSING}; run `sortd models export`"
        return
    yield f"Backend: {facts['name']}; {facts['why']}"
    if export is None:
        return
    has_int8 = "int8" in export["precisions"]
    gain = f"int8 is {'' if has_int8 else 'only '}{export['int8_gain']:.1f} times as fast as fp32"
    yield f"Its export takes {megabytes(export['size_bytes'])} in {export['folder']}; {gain}"
    if has_int8 and facts["name"] == "onnx":
        yield verdict_sentence(facts["agreement"])


def verdict_sentence(verdict: Mapping[str, Any] | None) -> str:
    """Return which precision is used, and why, from the verdict on int8 or None if there is none."""
    if verdict is None:
        return "fp32 is used: int8 was not compared with it on these datasets; run `sortd models export`"
    if verdict["refusal"]:
        return f"fp32 is used, not int8: {verdict['refusal']}"
    return (
        f"int8 is used: it files {verdict['same']} of {verdict['filed']} references as fp32 does, mean cosine "
        f"{verdict['mean_cosine']:.4f}"
    )


def export(config: Config, *, on_progress: Progress = lambda _: None) -> None:
    """Export the configured model unless a valid export exists, and compare int8 with float32 on the references.

    Raises ModelError: it cannot be exported, or the verdict cannot be written.
    """
    made = make_exports(locate_configured(config), on_progress=on_progress)
    if Precision.INT8 in made.precisions:
        facts = judge_int8(config, made, on_progress)
        try:
            write_verdict(made, config.root, facts)
        except OSError as error:
            raise ModelError(f"cannot write the verdict on int8 to {error.filename}: {error.strerror}") from error
