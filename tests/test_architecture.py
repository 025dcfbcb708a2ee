"""The floors of the house, as data: imports point down, and edges do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sortd"

THOUGHT, EDGE, DRIVER = 0, 1, 2

FLOORS: dict[str, tuple[int, str]] = {
    # floor 0: thought; knows no file, clock, thread, log or model
    "errors": (THOUGHT, "errors"),
    "support": (THOUGHT, "prototypes"),
    "prototypes": (THOUGHT, "prototypes"),
    "messages": (THOUGHT, "messages"),
    "backlog": (THOUGHT, "backlog"),
    "sorter": (THOUGHT, "sorter"),
    "explanation": (THOUGHT, "prototypes"),
    "finding": (THOUGHT, "finding"),
    "prompts": (THOUGHT, "prompts"),
    "companions": (THOUGHT, "companions"),
    "relocation": (THOUGHT, "relocation"),
    "pause": (THOUGHT, "sorter"),
    "guard": (THOUGHT, "sorter"),
    "orders": (THOUGHT, "sorter"),
    "rounds": (THOUGHT, "rounds"),
    "decision": (THOUGHT, "prototypes"),
    "prototype_set": (THOUGHT, "prototypes"),
    "plain": (THOUGHT, "prototypes"),
    "blend": (THOUGHT, "prototypes"),
    "gaussian": (THOUGHT, "prototypes"),
    "kernel": (THOUGHT, "prototypes"),
    "text_prototypes": (THOUGHT, "prototypes"),
    "duplicates": (THOUGHT, "prototypes"),
    "leaveoneout": (THOUGHT, "prototypes"),
    "refitting": (THOUGHT, "prototypes"),
    "confidence": (THOUGHT, "prototypes"),
    "calibration": (THOUGHT, "prototypes"),
    "strangers": (THOUGHT, "prototypes"),
    "reload_gate": (THOUGHT, "prototypes"),
    "held_out": (THOUGHT, "prototypes"),
    "evaluation": (THOUGHT, "prototypes"),
    "suspects": (THOUGHT, "prototypes"),
    "free_names": (THOUGHT, "relocation"),
    # floor 1: edges; one outside thing each
    "config": (EDGE, "config"),
    "config_sources": (EDGE, "config"),
    "config_mistakes": (EDGE, "config"),
    "yaml_tree": (EDGE, "config"),
    "logs": (EDGE, "logs"),
    "watch": (EDGE, "watch"),
    "ear": (EDGE, "watch"),
    "hints": (EDGE, "watch"),
    "inotify": (EDGE, "watch"),
    "scanning": (EDGE, "watch"),
    "images": (EDGE, "images"),
    "decoders": (EDGE, "images"),
    "decoder_handle": (EDGE, "images"),
    "decoder_process": (EDGE, "images"),
    "image_endings": (EDGE, "images"),
    "image_files": (EDGE, "images"),
    "image_formats": (EDGE, "images"),
    "image_pixels": (EDGE, "images"),
    "encoder": (EDGE, "encoder"),
    "models": (EDGE, "encoder"),
    "model_folders": (EDGE, "encoder"),
    "torch_encoder": (EDGE, "encoder"),
    "cache": (EDGE, "cache"),
    "cache_tables": (EDGE, "cache"),
    "cache_prototypes": (EDGE, "cache"),
    "journal": (EDGE, "journal"),
    "journal_history": (EDGE, "journal"),
    "journal_records": (EDGE, "journal"),
    "journal_store": (EDGE, "journal"),
    "mover": (EDGE, "mover"),
    "renaming": (EDGE, "mover"),
    "copying": (EDGE, "mover"),
    "crossing": (EDGE, "mover"),
    "recovery": (EDGE, "mover"),
    "signals": (EDGE, "signals"),
    "sdnotify": (EDGE, "sdnotify"),
    "thumbnails": (EDGE, "images"),
    "moments": (EDGE, "moments"),
    "metrics": (EDGE, "metrics"),
    "layout": (EDGE, "layout"),
    "status": (EDGE, "status"),
    # floor 2: drivers; they join edges to the core
    "embedding": (DRIVER, "drivers"),
    "references": (DRIVER, "drivers"),
    "worker": (DRIVER, "drivers"),
    "filing": (DRIVER, "drivers"),
    "relocating": (DRIVER, "drivers"),
    "undoing": (DRIVER, "drivers"),
    "account": (DRIVER, "drivers"),
    "collection": (DRIVER, "drivers"),
    "sweep": (DRIVER, "drivers"),
    "corrections": (DRIVER, "drivers"),
    "dataset": (DRIVER, "drivers"),
    "site": (DRIVER, "drivers"),
    "daemon": (DRIVER, "drivers"),
    "rehearsal": (DRIVER, "drivers"),
    "requests": (DRIVER, "drivers"),
    "control": (DRIVER, "drivers"),
    "evaluate": (DRIVER, "drivers"),
    "cli": (DRIVER, "drivers"),
    "cli_decisions": (DRIVER, "drivers"),
    "cli_facts": (DRIVER, "drivers"),
    "cli_models": (DRIVER, "drivers"),
    "cli_moves": (DRIVER, "drivers"),
    "console": (DRIVER, "drivers"),
    "check": (DRIVER, "drivers"),
    "check_calibration": (DRIVER, "drivers"),
    "check_disks": (DRIVER, "drivers"),
    "check_folders": (DRIVER, "drivers"),
    "check_references": (DRIVER, "drivers"),
    "check_running": (DRIVER, "drivers"),
    "stored": (DRIVER, "drivers"),
    "overview": (DRIVER, "drivers"),
    "journals": (DRIVER, "drivers"),
    "holding": (DRIVER, "drivers"),
    "model_list": (DRIVER, "drivers"),
    "explain": (DRIVER, "drivers"),
    "examination": (DRIVER, "drivers"),
    "report": (DRIVER, "drivers"),
    "evaluation_page": (DRIVER, "drivers"),
}
"""Module: its floor, and the noun that it is a part of. Modules of one noun may know each other."""

ENTRY_POINTS = {"__init__", "__main__"}

FORBIDDEN_TO_THOUGHT = {
    "os", "io", "time", "datetime", "threading", "queue", "subprocess", "socket", "logging", "structlog", "sqlite3",
    "random", "tempfile", "shutil", "torch", "PIL", "watchdog", "sentence_transformers", "transformers", "sklearn",
}  # fmt: skip
"""What the core must not know: files, clocks, threads, logs, models, chance."""

PURE_USES = {"free_names": {"os"}}
"""os.fsencode, os.fsdecode and os.path.splitext work on names and touch no file."""

SLOW = {"torch", "transformers", "sentence_transformers", "sklearn", "onnxruntime", "matplotlib", "accelerate"}
"""Nothing slow at import: these are imported inside functions only."""

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ENTRY_POINTS)


def imports_of(module: str, *, top_level_only: bool) -> set[str]:
    """Return the dotted names that a module imports, outside of ``if TYPE_CHECKING``."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import) and not (inside and top_level_only):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not (inside and top_level_only):
                found.add(child.module)
                if child.module == "sortd":
                    found.update(f"sortd.{alias.name}" for alias in child.names)
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
        target = imported.split(".")[0]
        if target not in FLOORS:
            assert (PACKAGE / target).is_dir(), f"{module} imports {name}, which has no floor"
            continue
        other_floor, other_noun = FLOORS[target]
        assert other_floor <= floor, f"{module} imports {target}, which stands above it"
        sideways = other_floor == floor == EDGE and other_noun != noun
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
    """At most 350 lines, and a docstring that says what its noun is."""
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 350


def test_nothing_is_pickled() -> None:
    """No module of the package unpickles anything: a cache or a model file must not run code."""
    for path in PACKAGE.rglob("*.py"):
        tops = (
            {name.split(".")[0] for name in imports_of(path.stem, top_level_only=False)}
            if path.parent == PACKAGE
            else set()
        )
        assert not tops & {"pickle", "joblib", "shelve", "marshal", "dill", "cloudpickle"}, path
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8"), path
