"""Facts about models: which are on this machine, which one is used and why, what runs it, and what is known of int8."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from sortd.commands.console import megabytes
from sortd.commands.finding import Finding, error, note, warning
from sortd.commands.promotion import finetuned_list
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.backends import choose, located
from sortd.encoder.models import STRONGER, ModelFolder, Use
from sortd.encoder.onnx_encoder import Exports, find, is_installed, read_verdict
from sortd.errors import ModelError
from sortd.status import read_status

CONTENT_DIGITS = 16
"""Of the sha256 over configuration and weights: enough to tell two models apart."""


def model_list(config: Config) -> dict[str, Any]:
    """Return the models as plain values; nothing is loaded and nothing is downloaded."""
    found = {model.folder: model for model in models.available(cache_dir=config.cache_dir)}
    problem, chosen = None, None
    try:
        chosen = models.locate(config.model, cache_dir=config.cache_dir)
        found.setdefault(chosen.folder, chosen)
    except ModelError as refusal:
        problem = str(refusal)
    status = read_status(config.state_dir)
    running = None
    if status is not None and status["alive"]:
        running = {"model": status.get("model"), "encoder_id": status.get("encoder_id")}
    return {
        "model": config.model,
        "models": [
            {**_row(one, config), "chosen": chosen is not None and one.folder == chosen.folder}
            for one in found.values()
        ],
        "problem": problem,
        "why": problem or _why(config.model, chosen),
        "advice": _advice(config.model, chosen),
        "backend": backend_facts(config),
        "running": running,
        "datasets": finetuned_list(config),
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


def _why(wanted: str, chosen: ModelFolder | None) -> str:
    if wanted != "auto" or chosen is None:
        return f"`model: {wanted}` says which one is used"
    if chosen.name == "packaged":
        return f"`model: auto` takes the packaged one, since {STRONGER} is not on this machine"
    return f"`model: auto` takes {chosen.name}, which is stronger than the packaged one, since it is on this machine"


def _advice(wanted: str, chosen: ModelFolder | None) -> list[str]:
    if chosen is not None and chosen.name == "packaged" and wanted == "auto":
        return [
            f"To have the stronger one, where there is a network: sortd models fetch {STRONGER}",
            "Without a network: copy its folder from another machine and set `model:` to its path",
        ]
    return []


def how_to_use(name: str, use: Use, config: Config) -> str:
    """Return, in a sentence, what a model that is on this machine now is for, and how to have it used."""
    again = "in the configuration, and start sortd again"
    match use:
        case Use.IMAGES:
            return (
                f"it sees images and knows no words, so it cannot be `model:`; it can be taught your classes: "
                f"`sortd finetune DATASET --base {name}`"
            )
        case Use.WORDS if config.text_model == name:
            return "`text_model:` names it: it reads the classes' names from the next start on"
        case Use.WORDS:
            return (
                f"it reads text and sees no images; beside the CLIP that it was taught with it reads the classes' "
                f"names: `text_model: {name}` {again}"
            )
    if config.model == name or (config.model == "auto" and name == STRONGER):
        return f"`model: {config.model}` takes it from the next start on"
    return f"to use it: `model: {name}` {again}"


# ------------------------------------------------------------ what runs the model


def backend_facts(config: Config) -> dict[str, Any]:
    """Return what would run the configured model, as plain values; nothing is loaded, exported or judged."""
    facts: dict[str, Any] = {
        "configured": config.backend,
        "name": None,
        "why": None,
        "problem": None,
        "is_installed": is_installed(),
        "export": None,
        "agreement": None,
    }
    try:
        model, words = located(config)
    except ModelError:  # whoever shows this says so of the model
        return facts
    try:
        found = find(model, words, cache_dir=config.cache_dir) if is_installed() else None
        if found is not None:
            facts |= {"export": _export_facts(found), "agreement": read_verdict(found, config.root)}
        chosen = choose(config.backend, model, words, device=config.device, cache_dir=config.cache_dir)
        facts |= {"name": chosen.name, "why": chosen.why}
    except ModelError as refusal:
        facts["problem"] = str(refusal)
    return facts


def _export_facts(found: Exports) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "size_bytes": found.size_bytes,
        "precisions": [one.value for one in found.precisions],
        "int8_gain": round(found.manifest.gain, 2),
        "made_with": dict(found.manifest.made_with),
    }


def backend_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``backend_facts`` in sentences, a line each."""
    if facts["problem"]:
        yield facts["problem"]
    if facts["name"] is None:
        return
    export = facts["export"]
    if _lacks_export(facts):
        yield "It is run by torch: the export to ONNX is missing, damaged or old; `sortd models export` makes it"
        return
    yield f"It is run by {facts['name']}: {facts['why']}"
    if export is None:
        return
    has_int8 = "int8" in export["precisions"]
    gain = f"int8 is {export['int8_gain']:.1f} times as quick as fp32"
    gain = gain if has_int8 else f"{gain} here, which is not worth it"
    yield f"Its export takes {megabytes(export['size_bytes'])} in {export['folder']}; {gain}"
    if has_int8:
        yield _int8_sentence(facts["agreement"])


def _lacks_export(facts: Mapping[str, Any]) -> bool:
    return facts["name"] == "onnx" and facts["export"] is None


def _int8_sentence(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "fp32 serves and int8 does not: it was not held against fp32 here; `sortd models export` does it"
    if verdict["refusal"]:
        return f"fp32 serves and int8 does not: {verdict['refusal']}"
    return (
        f"int8 serves: it files {verdict['same']} of {verdict['filed']} references as fp32 does, mean cosine "
        f"{verdict['mean_cosine']:.4f}"
    )


def model_findings(config: Config) -> Iterator[Finding]:
    """Yield which model would be used and what would run it, or how to get the configured one."""
    subject = f"model: {config.model}"
    try:
        model = models.locate(config.model, cache_dir=config.cache_dir)
        yield note(subject, f"is {model.name}, a {model.kind} of {megabytes(model.size_bytes)} in {model.folder}")
        if config.model == "auto" and model.name == "packaged":
            what = f"the stronger model {STRONGER} is not on this machine"
            yield note(subject, what, f"sortd models fetch {STRONGER}")
        if config.text_model is not None:
            subject = f"text_model: {config.text_model}"
            models.locate_text(config.text_model, cache_dir=config.cache_dir)
    except ModelError as refusal:
        yield error(subject, str(refusal))
    yield from _backend_findings(config)


def _backend_findings(config: Config) -> Iterator[Finding]:
    """Yield what would run the model, and what is in the way of something quicker."""
    facts = backend_facts(config)
    subject = f"backend: {config.backend}"
    if facts["problem"]:
        yield error(subject, facts["problem"])
    if facts["name"] is None:
        return
    export = facts["export"]
    if _lacks_export(facts):
        missing = "the export to ONNX is missing, damaged or old, so torch runs the model"
        yield warning(subject, missing, "sortd models export")
        return
    mend = "sortd models export" if facts["name"] == "torch" and facts["is_installed"] and not export else ""
    yield note(subject, f"the model is run by {facts['name']}: {facts['why']}", mend)
    if facts["name"] == "onnx" and "int8" in export["precisions"]:
        mend = "" if facts["agreement"] else "sortd models export"
        yield note(subject, _int8_sentence(facts["agreement"]), mend)
