"""The floors of the house, as data: imports point down, and edges do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sortd"

THOUGHT, EDGE, DRIVER = 0, 1, 2

FLOORS: dict[str, tuple[int, str]] = {
    # floor 0: thought; knows no file, clock, thread, log or model
    "errors": (THOUGHT, "errors"),
    "mends": (THOUGHT, "mends"),
    "deciding.steps": (THOUGHT, "prototypes"),
    "names": (THOUGHT, "names"),
    "deciding.support": (THOUGHT, "prototypes"),
    "prototypes": (THOUGHT, "prototypes"),
    "deciding.explanation": (THOUGHT, "prototypes"),
    "commands.finding": (THOUGHT, "finding"),
    "deciding.prompts": (THOUGHT, "prompts"),
    "moving.companions": (THOUGHT, "companions"),
    "moving.relocation": (THOUGHT, "relocation"),
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
    "encoding.normalisation": (THOUGHT, "normalisation"),
    "moving.free_names": (THOUGHT, "relocation"),
    "finetuning.groups": (THOUGHT, "split"),
    "finetuning.split": (THOUGHT, "split"),
    "finetuning.gaussian_head": (THOUGHT, "gaussian_head"),
    "finetuning.measures": (THOUGHT, "verdict"),
    "finetuning.verdict": (THOUGHT, "verdict"),
    "finetuning.recipe": (THOUGHT, "recipe"),
    "core.guard": (THOUGHT, "core"),
    "core.schedule": (THOUGHT, "core"),
    "core.sorter": (THOUGHT, "core"),
    "core.state": (THOUGHT, "core"),
    "events": (THOUGHT, "events"),
    # floor 1: edges; one outside thing each
    "files": (EDGE, "files"),
    "config": (EDGE, "config"),
    "configuring.sources": (EDGE, "config"),
    "configuring.mistakes": (EDGE, "config"),
    "configuring.yaml_tree": (EDGE, "config"),
    "logs": (EDGE, "logs"),
    "console_line": (EDGE, "logs"),
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
    "decoding.thumbnails": (EDGE, "images"),
    "moments": (EDGE, "moments"),
    "metrics": (EDGE, "metrics"),
    "layout": (EDGE, "layout"),
    "finetuned": (EDGE, "finetuned"),
    "finetuning.network": (EDGE, "finetuned"),
    "status": (EDGE, "status"),
    "promotion": (EDGE, "finetuned"),
    "systemd": (EDGE, "systemd"),
    "watch.inotify": (EDGE, "watch"),
    "watch.observer": (EDGE, "watch"),
    "watch.scan": (EDGE, "watch"),
    "watch.watcher": (EDGE, "watch"),
    # floor 2: drivers; they join edges to the core
    "references": (DRIVER, "drivers"),
    "running.filing": (DRIVER, "drivers"),
    "running.relocating": (DRIVER, "drivers"),
    "running.undoing": (DRIVER, "drivers"),
    "running.crossings": (DRIVER, "drivers"),
    "running.copier": (DRIVER, "drivers"),
    "running.residence": (DRIVER, "drivers"),
    "running.latecomers": (DRIVER, "drivers"),
    "running.rejects": (DRIVER, "drivers"),
    "running.outbox": (DRIVER, "drivers"),
    "running.presence": (DRIVER, "drivers"),
    "running.precision": (DRIVER, "drivers"),
    "running.comparison": (DRIVER, "drivers"),
    "running.exporting": (DRIVER, "drivers"),
    "running.verdict": (DRIVER, "drivers"),
    "running.rehearsal": (DRIVER, "drivers"),
    "evaluate": (DRIVER, "drivers"),
    "cli": (DRIVER, "drivers"),
    "commands.bench": (DRIVER, "drivers"),
    "commands.measurement": (DRIVER, "drivers"),
    "commands.stopwatch": (DRIVER, "drivers"),
    "commands.decisions": (DRIVER, "drivers"),
    "commands.facts": (DRIVER, "drivers"),
    "commands.models": (DRIVER, "drivers"),
    "commands.moves": (DRIVER, "drivers"),
    "commands.console": (DRIVER, "drivers"),
    "commands.check": (DRIVER, "drivers"),
    "commands.check_calibration": (DRIVER, "drivers"),
    "commands.check_disks": (DRIVER, "drivers"),
    "commands.check_folders": (DRIVER, "drivers"),
    "commands.check_references": (DRIVER, "drivers"),
    "commands.check_running": (DRIVER, "drivers"),
    "commands.stored": (DRIVER, "drivers"),
    "commands.overview": (DRIVER, "drivers"),
    "commands.journals": (DRIVER, "drivers"),
    "running.holding": (DRIVER, "drivers"),
    "commands.model_list": (DRIVER, "drivers"),
    "commands.backend": (DRIVER, "drivers"),
    "commands.promotion": (DRIVER, "drivers"),
    "commands.explain": (DRIVER, "drivers"),
    "commands.examination": (DRIVER, "drivers"),
    "report": (DRIVER, "drivers"),
    "commands.evaluation_page": (DRIVER, "drivers"),
    "finetune": (DRIVER, "drivers"),
    "commands.finetuning": (DRIVER, "drivers"),
    "finetuning.arguments": (DRIVER, "drivers"),
    "finetuning.averaging": (DRIVER, "drivers"),
    "finetuning.base": (DRIVER, "drivers"),
    "finetuning.card": (DRIVER, "drivers"),
    "finetuning.champion": (DRIVER, "drivers"),
    "finetuning.judging": (DRIVER, "drivers"),
    "finetuning.lora": (DRIVER, "drivers"),
    "finetuning.photos": (DRIVER, "drivers"),
    "finetuning.pictures": (DRIVER, "drivers"),
    "finetuning.plan": (DRIVER, "drivers"),
    "finetuning.preparation": (DRIVER, "drivers"),
    "finetuning.result": (DRIVER, "drivers"),
    "finetuning.start": (DRIVER, "drivers"),
    "finetuning.trainee": (DRIVER, "drivers"),
    "finetuning.training": (DRIVER, "drivers"),
    "finetuning.views": (DRIVER, "drivers"),
    "daemon.classifiers": (DRIVER, "drivers"),
    "daemon.control": (DRIVER, "drivers"),
    "daemon.corrections": (DRIVER, "drivers"),
    "daemon.daemon": (DRIVER, "drivers"),
    "daemon.dataset": (DRIVER, "drivers"),
    "daemon.dataset_log": (DRIVER, "drivers"),
    "daemon.datasets": (DRIVER, "drivers"),
    "daemon.embedder": (DRIVER, "drivers"),
    "daemon.inbox": (DRIVER, "drivers"),
    "daemon.scans": (DRIVER, "drivers"),
    "daemon.resources": (DRIVER, "drivers"),
    "daemon.worker": (DRIVER, "drivers"),
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

PURE_USES = {"moving.free_names": {"os"}, "moving.companions": {"os"}}
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
