"""Facts about models: the models on this machine, the selected one, its backend, and the verdict on int8."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from sortd.commands.check_references import Finding, error, note, warning
from sortd.commands.console import megabytes
from sortd.commands.promotion import list_finetuned_models
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.backends import choose_backend
from sortd.encoder.models import STRONGER, ModelFolder, Use, locate_configured
from sortd.encoder.onnx_encoder import Exports, find_exports, is_installed, read_verdict
from sortd.errors import ModelError
from sortd.service import read_status

CONTENT_DIGITS = 16  # of the sha256 over configuration and weights; enough to distinguish models
_EXPORT_MISSING = "the export to ONNX is missing, damaged or outdated"


def model_list(config: Config) -> dict[str, Any]:
    """Return the models as plain values; nothing is loaded or downloaded."""
    found = {model.folder: model for model in models.available(cache_dir=config.cache_dir)}
    problem, chosen = None, None
    try:
        chosen = models.locate_clip(config.model, cache_dir=config.cache_dir)
        found.setdefault(chosen.folder, chosen)
    except ModelError as refusal:
        problem = str(refusal)
    status = read_status(config.state_dir)
    running = None
    if status is not None and status["alive"]:
        running = {"model": status.get("model"), "encoder_id": status.get("encoder_id")}
    why, advice = _why(config.model, chosen)
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
                f"it takes images but no text, so it cannot be `model:`; it can be the base of a fine-tuned model: "
                f"`sortd finetune DATASET --base {name}`"
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


# ------------------------------------------------------------ the backend


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
    try:
        model = locate_configured(config)
    except ModelError:  # ``model_list`` and ``check`` report it
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
        yield f"Backend: torch, since {_EXPORT_MISSING}; run `sortd models export`"
        return
    yield f"Backend: {facts['name']}; {facts['why']}"
    if export is None:
        return
    has_int8 = "int8" in export["precisions"]
    gain = f"int8 is {'' if has_int8 else 'only '}{export['int8_gain']:.1f} times as fast as fp32"
    yield f"Its export takes {megabytes(export['size_bytes'])} in {export['folder']}; {gain}"
    if has_int8 and facts["name"] == "onnx":
        yield _verdict_sentence(facts["agreement"])


def _verdict_sentence(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "fp32 is used: int8 was not compared with it on these datasets; run `sortd models export`"
    if verdict["refusal"]:
        return f"fp32 is used, not int8: {verdict['refusal']}"
    return (
        f"int8 is used: it files {verdict['same']} of {verdict['filed']} references as fp32 does, mean cosine "
        f"{verdict['mean_cosine']:.4f}"
    )


def model_findings(config: Config) -> Iterator[Finding]:
    """Yield which model would be used and what would run it, or how to get the configured one."""
    subject = f"model: {config.model}"
    try:
        model = models.locate_clip(config.model, cache_dir=config.cache_dir)
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
    """Yield findings about the backend, and how to get a faster one."""
    facts = backend_facts(config)
    subject, command = f"backend: {config.backend}", "sortd models export"
    if facts["problem"]:
        yield error(subject, facts["problem"])
    if facts["name"] is None:
        return
    export = facts["export"]
    if facts["name"] == "onnx" and export is None:
        yield warning(subject, f"{_EXPORT_MISSING}, so torch is used", command)
        return
    remedy = command if facts["name"] == "torch" and facts["is_installed"] and not export else ""
    yield note(subject, f"the model runs on {facts['name']}: {facts['why']}", remedy)
    if facts["name"] == "onnx" and "int8" in export["precisions"]:
        verdict = facts["agreement"]
        yield note(subject, _verdict_sentence(verdict), "" if verdict else command)
