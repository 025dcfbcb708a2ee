"""The floors of the house, as data: imports point down, and edges do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sortd"

THOUGHT, EDGE, DRIVER = 0, 1, 2

FLOORS: dict[str, tuple[int, str]] = {
    # floor 0: thought; knows no file, clock, thread, log or model
    "arrays": (THOUGHT, "arrays"),
    "errors": (THOUGHT, "errors"),
    "deciding.steps": (THOUGHT, "prototypes"),
    "names": (THOUGHT, "names"),
    "classify.types": (THOUGHT, "classify"),
    "classify.prompts": (THOUGHT, "prompts"),
    "classify.library": (THOUGHT, "classify"),
    "classify.gaussian": (THOUGHT, "classify"),
    "classify.kernel": (THOUGHT, "classify"),
    "classify.open_set": (THOUGHT, "classify"),
    "classify.calibration": (THOUGHT, "classify"),
    "classify.leave_one_out": (THOUGHT, "classify"),
    "classify.blend": (THOUGHT, "classify"),
    "classify.prototypes": (THOUGHT, "classify"),
    "classify.build": (THOUGHT, "classify"),
    "classify.decide": (THOUGHT, "classify"),
    "classify.explain": (THOUGHT, "classify"),
    "classify.held_out": (THOUGHT, "classify"),
    "classify.evaluate": (THOUGHT, "classify"),
    "messages": (THOUGHT, "messages"),
    "backlog": (THOUGHT, "backlog"),
    "sorter": (THOUGHT, "sorter"),
    "commands.finding": (THOUGHT, "finding"),
    "moving.companions": (THOUGHT, "companions"),
    "store.records": (THOUGHT, "records"),
    "sorting.pause": (THOUGHT, "sorter"),
    "sorting.rebuilds": (THOUGHT, "sorter"),
    "sorting.guard": (THOUGHT, "sorter"),
    "sorting.orders": (THOUGHT, "sorter"),
    "sorting.rounds": (THOUGHT, "rounds"),
    "sorting.settings": (THOUGHT, "sorter"),
    "sorting.entry": (THOUGHT, "backlog"),
    "sorting.refusals": (THOUGHT, "backlog"),
    "deciding.decision": (THOUGHT, "prototypes"),
    "deciding.prototype_set": (THOUGHT, "prototypes"),
    "deciding.plain": (THOUGHT, "prototypes"),
    "deciding.blend": (THOUGHT, "prototypes"),
    "deciding.gaussian": (THOUGHT, "prototypes"),
    "deciding.kernel": (THOUGHT, "prototypes"),
    "deciding.text_prototypes": (THOUGHT, "prototypes"),
    "deciding.duplicates": (THOUGHT, "prototypes"),
    "deciding.leaveoneout": (THOUGHT, "prototypes"),
    "deciding.refitting": (THOUGHT, "prototypes"),
    "deciding.confidence": (THOUGHT, "prototypes"),
    "deciding.calibration": (THOUGHT, "prototypes"),
    "deciding.familiarity": (THOUGHT, "prototypes"),
    "deciding.strangers": (THOUGHT, "prototypes"),
    "deciding.reload_gate": (THOUGHT, "prototypes"),
    "deciding.held_out": (THOUGHT, "prototypes"),
    "deciding.agreement": (THOUGHT, "prototypes"),
    "deciding.evaluation": (THOUGHT, "prototypes"),
    "deciding.suspects": (THOUGHT, "prototypes"),
    "deciding.finetuned_classifier": (THOUGHT, "prototypes"),
    "deciding.classifier": (THOUGHT, "prototypes"),
    "deciding.finetuned_explanation": (THOUGHT, "prototypes"),
    "encoder.preprocessing": (THOUGHT, "preprocessing"),
    "encoding.normalisation": (THOUGHT, "normalisation"),
    "moving.free_names": (THOUGHT, "relocation"),
    "finetuning.groups": (THOUGHT, "split"),
    "finetuning.split": (THOUGHT, "split"),
    "finetuning.gaussian_head": (THOUGHT, "gaussian_head"),
    "finetuning.measures": (THOUGHT, "verdict"),
    "finetuning.verdict": (THOUGHT, "verdict"),
    "finetuning.recipe": (THOUGHT, "recipe"),
    # floor 1: edges; one outside thing each
    "files": (EDGE, "files"),
    "config": (EDGE, "config"),
    "configuring.yaml_tree": (EDGE, "config"),
    "logs": (EDGE, "logs"),
    "watch": (EDGE, "watch"),
    "watching.ear": (EDGE, "watch"),
    "watching.hints": (EDGE, "watch"),
    "watching.inotify": (EDGE, "watch"),
    "watching.scanning": (EDGE, "watch"),
    "images.decode": (EDGE, "images"),
    "images.pool": (EDGE, "images"),
    "images.decoder_process": (EDGE, "images"),
    "images.formats": (EDGE, "images"),
    "images.structure": (EDGE, "images"),
    "encoder.base": (EDGE, "encoder"),
    "encoder.models": (EDGE, "encoder"),
    "encoder.torch_encoder": (EDGE, "encoder"),
    "encoder.onnx_encoder": (EDGE, "encoder"),
    "encoder.export": (EDGE, "encoder"),
    "encoder.quantize": (EDGE, "encoder"),
    "cache": (EDGE, "cache"),
    "caching.tables": (EDGE, "cache"),
    "caching.stored_prototypes": (EDGE, "cache"),
    "journal": (EDGE, "journal"),
    "journaling.history": (EDGE, "journal"),
    "journaling.records": (EDGE, "journal"),
    "journaling.store": (EDGE, "journal"),
    "mover": (EDGE, "mover"),
    "moving.renaming": (EDGE, "mover"),
    "moving.copying": (EDGE, "mover"),
    "moving.listing": (EDGE, "mover"),
    "moving.crossing": (EDGE, "mover"),
    "moving.recovery": (EDGE, "mover"),
    "images": (EDGE, "images"),
    "decoding.decoders": (EDGE, "images"),
    "decoding.decoder_handle": (EDGE, "images"),
    "decoding.decoder_process": (EDGE, "images"),
    "decoding.endings": (EDGE, "images"),
    "decoding.files": (EDGE, "images"),
    "decoding.formats": (EDGE, "images"),
    "decoding.pixels": (EDGE, "images"),
    "decoding.png_chunks": (EDGE, "images"),
    "encoder": (EDGE, "encoder"),
    "encoding.models": (EDGE, "encoder"),
    "encoding.model_folders": (EDGE, "encoder"),
    "encoding.torch_encoder": (EDGE, "encoder"),
    "encoding.rows": (EDGE, "encoder"),
    "encoding.backends": (EDGE, "encoder"),
    "encoding.exports": (EDGE, "encoder"),
    "encoding.export_process": (EDGE, "encoder"),
    "encoding.providers": (EDGE, "encoder"),
    "encoding.manifest": (EDGE, "encoder"),
    "encoding.onnx_encoder": (EDGE, "encoder"),
    "encoding.onnx_export": (EDGE, "encoder"),
    "encoding.onnx_int8": (EDGE, "encoder"),
    "store.cache": (EDGE, "cache"),
    "store.journal": (EDGE, "journal"),
    "store.history": (EDGE, "journal"),
    "store.database": (EDGE, "journal"),
    "moving.fs": (EDGE, "mover"),
    "signals": (EDGE, "signals"),
    "sdnotify": (EDGE, "sdnotify"),
    "decoding.thumbnails": (EDGE, "images"),
    "metrics": (EDGE, "metrics"),
    "layout": (EDGE, "layout"),
    "finetuned": (EDGE, "encoder"),
    "finetuned_network": (EDGE, "encoder"),
    "status": (EDGE, "status"),
    # floor 2: drivers; they join edges to the core
    "running.embedding": (DRIVER, "drivers"),
    "running.pipeline": (DRIVER, "drivers"),
    "references": (DRIVER, "drivers"),
    "running.worker": (DRIVER, "drivers"),
    "moving.plan": (DRIVER, "drivers"),
    "moving.parts": (DRIVER, "drivers"),
    "moving.rename": (DRIVER, "drivers"),
    "moving.copy": (DRIVER, "drivers"),
    "moving.copy_queue": (DRIVER, "drivers"),
    "moving.undo": (DRIVER, "drivers"),
    "moving.mover": (DRIVER, "drivers"),
    "running.rejects": (DRIVER, "drivers"),
    "running.review_scan": (DRIVER, "drivers"),
    "running.looks": (DRIVER, "drivers"),
    "running.left_files": (DRIVER, "drivers"),
    "running.outbox": (DRIVER, "drivers"),
    "running.classifiers": (DRIVER, "drivers"),
    "running.lanes": (DRIVER, "drivers"),
    "running.account": (DRIVER, "drivers"),
    "running.collection": (DRIVER, "drivers"),
    "running.sweep": (DRIVER, "drivers"),
    "running.inbox": (DRIVER, "drivers"),
    "running.corrections": (DRIVER, "drivers"),
    "running.patrol": (DRIVER, "drivers"),
    "running.presence": (DRIVER, "drivers"),
    "running.rebuilding": (DRIVER, "drivers"),
    "running.dataset": (DRIVER, "drivers"),
    "running.site": (DRIVER, "drivers"),
    "daemon": (DRIVER, "drivers"),
    "running.rehearsal": (DRIVER, "drivers"),
    "running.requests": (DRIVER, "drivers"),
    "running.control": (DRIVER, "drivers"),
    "cli": (DRIVER, "drivers"),
    "commands.bench": (DRIVER, "drivers"),
    "commands.decisions": (DRIVER, "drivers"),
    "commands.facts": (DRIVER, "drivers"),
    "encoder.backends": (DRIVER, "drivers"),
    "commands.models": (DRIVER, "drivers"),
    "commands.model_facts": (DRIVER, "drivers"),
    "commands.export": (DRIVER, "drivers"),
    "commands.moves": (DRIVER, "drivers"),
    "commands.console": (DRIVER, "drivers"),
    "commands.check": (DRIVER, "drivers"),
    "commands.check_references": (DRIVER, "drivers"),
    "commands.stored": (DRIVER, "drivers"),
    "commands.overview": (DRIVER, "drivers"),
    "commands.journals": (DRIVER, "drivers"),
    "running.holding": (DRIVER, "drivers"),
    "commands.promotion": (DRIVER, "drivers"),
    "commands.explain": (DRIVER, "drivers"),
    "commands.examination": (DRIVER, "drivers"),
    "report": (DRIVER, "drivers"),
    "commands.evaluation_page": (DRIVER, "drivers"),
    "finetune.data": (DRIVER, "drivers"),
    "finetune.evaluate": (DRIVER, "drivers"),
    "finetune.model": (DRIVER, "drivers"),
    "finetune.recipe": (DRIVER, "drivers"),
    "finetune.report": (DRIVER, "drivers"),
    "finetune.run": (DRIVER, "drivers"),
    "finetune.train": (DRIVER, "drivers"),
    "finetune": (DRIVER, "drivers"),
    "commands.finetuning": (DRIVER, "drivers"),
}
"""Module: its floor, and the noun that it is a part of. Modules of one noun may know each other."""

FOR_ALL_EDGES = {"files"}
"""What every edge may use: how sortd's own small files are read and written."""

ENTRY_POINTS = {"__init__", "__main__"}

FORBIDDEN_TO_THOUGHT = {
    "os", "io", "time", "datetime", "threading", "queue", "subprocess", "socket", "logging", "structlog", "sqlite3",
    "random", "tempfile", "shutil", "torch", "PIL", "watchdog", "sentence_transformers", "transformers", "sklearn",
}  # fmt: skip
"""What the core must not know: files, clocks, threads, logs, models, chance."""

PURE_USES = {"moving.companions": {"os"}, "store.records": {"os"}}
"""os.fsencode, os.fsdecode and os.path.splitext work on names and touch no file."""

SLOW = {
    "torch", "transformers", "sentence_transformers", "sklearn", "onnxruntime", "onnx", "tokenizers", "matplotlib",
    "accelerate",
}  # fmt: skip
"""Nothing slow at import: these are imported inside functions only."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ENTRY_POINTS
)


def file_of(module: str) -> Path:
    """Return the file of a module, which is named from the package on."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports_of(module: str, *, top_level_only: bool) -> set[str]:
    """Return the dotted names that a module imports, outside of ``if TYPE_CHECKING``."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import) and not (inside and top_level_only):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not (inside and top_level_only):
                found.add(child.module)
                if child.module.split(".")[0] == "sortd":
                    found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child, inside=inside or isinstance(child, ast.FunctionDef | ast.Lambda))

    visit(tree, inside=False)
    return found


def test_every_module_has_a_floor() -> None:
    """A new module is given its place on purpose, and a deleted one gives it back."""
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("module", [name for name in MODULES if name in FLOORS])
def test_imports_point_down(module: str) -> None:
    """No module imports from a higher floor, and no edge imports another edge."""
    floor, noun = FLOORS[module]
    for name in imports_of(module, top_level_only=False):
        package, _, imported = name.partition(".")
        if package != "sortd" or not imported or imported.startswith("__"):
            continue
        target = next((name for name in (imported, imported.rpartition(".")[0]) if name in FLOORS), None)
        if target is None:
            assert (PACKAGE / imported.replace(".", "/")).is_dir(), f"{module} imports {name}, which has no floor"
            continue
        other_floor, other_noun = FLOORS[target]
        assert other_floor <= floor, f"{module} imports {target}, which stands above it"
        sideways = other_floor == floor == EDGE and other_noun != noun and target not in FOR_ALL_EDGES
        assert not sideways, f"{module} and {target} are different edges: let a driver join them"


@pytest.mark.parametrize("module", [name for name, (floor, _) in FLOORS.items() if floor == THOUGHT])
def test_the_core_knows_no_outside(module: str) -> None:
    """Thought is pure: no file, clock, thread, log, model or chance."""
    tops = {name.split(".")[0] for name in imports_of(module, top_level_only=False)}
    assert not tops & (FORBIDDEN_TO_THOUGHT - PURE_USES.get(module, set()))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_slow_is_imported_at_the_top(module: str) -> None:
    """The command line answers at once because torch and its kin are imported where they are used."""
    tops = {name.split(".")[0] for name in imports_of(module, top_level_only=True)}
    assert not tops & SLOW


@pytest.mark.parametrize("module", MODULES)
def test_a_module_reads_in_one_sitting(module: str) -> None:
    """At most 500 lines, and a docstring that says what its noun is."""
    text = file_of(module).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 500


def test_nothing_is_pickled() -> None:
    """No module of the package unpickles anything: a cache or a model file must not run code."""
    for module in MODULES:
        tops = {name.split(".")[0] for name in imports_of(module, top_level_only=False)}
        assert not tops & {"pickle", "joblib", "shelve", "marshal", "dill", "cloudpickle"}, module
        assert "allow_pickle=True" not in file_of(module).read_text(encoding="utf-8"), module
