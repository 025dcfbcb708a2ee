"""The backend as the commands show it: what would run the model and why, its export, and the verdict on int8."""

from collections.abc import Iterator, Mapping
from typing import Any

from sortd.commands.console import megabytes
from sortd.commands.finding import Finding, Topic, error, note
from sortd.config import Config
from sortd.encoding import exports, models
from sortd.encoding.backends import choose
from sortd.encoding.exports import Exports
from sortd.encoding.model_folders import ModelFolder
from sortd.errors import ModelError
from sortd.running.verdict import read_verdict


def backend_facts(config: Config) -> dict[str, Any]:
    """Return what would run the configured model, as plain values; nothing is loaded, exported or judged."""
    facts: dict[str, Any] = {
        "configured": config.backend,
        "name": None,
        "why": None,
        "problem": None,
        "is_installed": exports.is_installed(),
        "export": None,
        "agreement": None,
    }
    try:
        model = models.locate(config.model, cache_dir=config.cache_dir)
        words = None if config.text_model is None else models.locate_text(config.text_model, cache_dir=config.cache_dir)
    except ModelError:  # whoever shows this says so of the model
        return facts
    try:
        found = _found(config, model, words)
        if found is not None:
            facts["export"] = _export_facts(found)
            verdict = read_verdict(found, config.root)
            facts["agreement"] = None if verdict is None else verdict.facts()
        chosen = choose(config.backend, model, words, device=config.device, cache_dir=config.cache_dir)
        facts |= {"name": chosen.name, "why": chosen.why}
    except ModelError as refusal:
        facts["problem"] = str(refusal)
    return facts


def _found(config: Config, model: ModelFolder, words: ModelFolder | None) -> Exports | None:
    return exports.find(model, words, cache_dir=config.cache_dir) if exports.is_installed() else None


def _export_facts(found: Exports) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "size_bytes": found.size_bytes,
        "precisions": [one.value for one in found.precisions],
        "int8_gain": round(found.manifest.gain, 2),
        "made_with": dict(found.manifest.made_with),
    }


def backend_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what people are told of ``backend_facts``, a sentence a line."""
    if facts["problem"]:
        yield facts["problem"]
    if facts["name"] is None:
        return
    yield f"It is run by {facts['name']}: {facts['why']}"
    export, verdict = facts["export"], facts["agreement"]
    if export is not None:
        yield f"Its export takes {megabytes(export['size_bytes'])} in {export['folder']}; {_int8_words(export)}"
    if verdict is not None:
        yield f"On the references of the last start, {_verdict_words(verdict)}"
    elif export is not None and "int8" in export["precisions"]:
        yield "int8 serves after it filed the references as fp32 does, which the next start finds out"


def _int8_words(export: Mapping[str, Any]) -> str:
    gain = f"int8 is {export['int8_gain']:.1f} times as quick as fp32"
    return gain if "int8" in export["precisions"] else f"{gain} here, which is not worth it"


def _verdict_words(verdict: Mapping[str, Any]) -> str:
    if verdict["refusal"]:
        return f"fp32 serves and int8 does not: {verdict['refusal']}"
    return (
        f"int8 serves: it files {verdict['same']} of {verdict['filed']} as fp32 does, mean cosine "
        f"{verdict['mean_cosine']:.4f}"
    )


def backend_findings(config: Config) -> Iterator[Finding]:
    """Tell what would run the model, and what is in the way of something quicker."""
    facts = backend_facts(config)
    subject = f"backend: {config.backend}"
    if facts["problem"]:
        yield error(Topic.MODEL, subject, facts["problem"])
    if facts["name"] is None:
        return
    if facts["name"] == "onnx" and facts["export"] is None:
        yield note(
            Topic.MODEL, subject, "the next start exports the model, which takes a minute", "sortd models export"
        )
        return
    mend = "sortd models export" if facts["name"] == "torch" and facts["is_installed"] and not facts["export"] else ""
    yield note(Topic.MODEL, subject, f"the model is run by {facts['name']}: {facts['why']}", mend)
    verdict = facts["agreement"]
    if facts["name"] == "onnx" and verdict is not None:
        yield note(Topic.MODEL, subject, f"on the references of the last start, {_verdict_words(verdict)}")
