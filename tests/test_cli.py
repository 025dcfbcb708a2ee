"""The command line as a whole: what there is, what it costs, and how it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sortd.commands.console import counted, megabytes, printable
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset
from tests.filed_images import file_images

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "run", "once", "check", "status", "explain", "eval", "history", "undo", "release", "init", "rebuild", "models",
    "version",
}  # fmt: skip
SLOW = {"torch", "transformers", "sentence_transformers", "sklearn", "scipy", "huggingface_hub"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sortd", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a dataset into which an image was filed."""
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {"a.png": "red"})
    return write_config(tmp_path)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    """It says in a sentence what it does, and knows how to be configured where it needs to."""
    ran = sortd(command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out
    if command not in {"init", "version"}:
        assert "--config" in ran.out


def test_help_names_them_all() -> None:
    """No command is hidden, and there is none that no test knows."""
    text = run("--help").stdout
    lines = [line.strip("│ ").split() for line in text[text.index("Commands") :].splitlines()]
    assert {words[0] for words in lines if words and words[0] in COMMANDS} == COMMANDS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", "-c"),
        ("status", "-c"),
        ("history", "-c"),
        ("undo", "--last", "1", "-c"),
        ("release", "--all", "-c"),
        ("models", "-c"),
    ],
)
def test_what_answers_at_once_imports_nothing_slow(config: Path, arguments: tuple[str, ...]) -> None:
    """Torch and its kin cost seconds; who only asks does not pay for them."""
    given = [*arguments, str(config)] if arguments[-1] == "-c" else [*arguments]
    code = (
        "import sys; from sortd.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(sorted({SLOW!r} & set(sys.modules)), file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stderr.splitlines()[-1] == "[]"


def test_errors_are_sentences(tmp_path: Path) -> None:
    """What the user can mend comes without a traceback, on stderr, with its exit code."""
    gone = run("status", "-c", tmp_path / "gone.yaml")
    assert gone.returncode == 78
    assert gone.stderr.startswith(f"sortd: {tmp_path / 'gone.yaml'}: cannot be read")
    assert gone.stdout == ""
    assert run("status", "--nonsense").returncode == 2
    assert run("nonsense").returncode == 2


def test_nobody_reading_is_no_error(config: Path) -> None:
    """``sortd history | head -0`` ends quietly."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "sortd", "history", "-c", str(config)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
    )
    os.close(writer)
    assert ran.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["status", "history", "check"])
def test_a_state_that_may_not_be_read_is_said(config: Path, command: str) -> None:
    """Whoever is not the service's user hears so in a sentence."""
    for folder in (config.parent, *config.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    (config.parent / "state").chmod(0o700)
    sortd(command, "-c", config)  # imports all that is needed: another user may not be allowed to read this Python
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        ran = sortd(command, "-c", config)
        os._exit(ran.code if "cannot be read" in ran.out + ran.err else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 78


def test_models_are_listed_without_the_network(config: Path, tmp_path: Path) -> None:
    """What is here, what is used, and how to get more."""
    write_config(tmp_path, model="auto")
    facts = sortd("models", "-c", config, "--json", environment={"HF_HOME": str(tmp_path / "none")}).facts
    assert facts["model"] == "auto"
    assert facts["why"]
    assert sortd("models", "list", "-c", config).code == 0


def test_a_model_in_a_folder_is_listed_as_chosen(config: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """A folder that only the configuration knows is one of the models."""
    write_config(tmp_path, model=tiny_clip)
    chosen = [one for one in sortd("models", "-c", config, "--json").facts["models"] if one["chosen"]]
    assert [one["folder"] for one in chosen] == [str(tiny_clip)]
    assert len(chosen[0]["content"]) == 16
    write_config(tmp_path, model=tmp_path / "nowhere")
    assert "there is no folder" in sortd("models", "-c", config, "--json").facts["problem"]


def test_names_are_shown_safely() -> None:
    """Control characters, directions and undecodable bytes come out as escapes, letters as they are."""
    assert printable("señal.png") == "señal.png"
    assert printable("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"
    assert printable(os.fsdecode(b"\xff")) == "\\xff"


def test_numbers_are_said_as_people_do() -> None:
    """One image, two classes, three copies."""
    assert [counted(1, "image"), counted(2000, "class"), counted(0, "copy")] == ["1 image", "2,000 classes", "0 copies"]
    assert [megabytes(10), megabytes(2_500), megabytes(9.9e6), megabytes(3e9)] == ["10 B", "2.5 kB", "9.9 MB", "3.0 GB"]


def test_the_daemon_makes_the_threads_of_products_patient_before_they_are_there(tmp_path: Path) -> None:
    """OpenBLAS reads how long its threads spin when numpy is loaded, so it is told before; a user's choice stays."""
    code = (
        "import os, sys\n"
        "from sortd import cli, errors\n"
        "assert 'numpy' not in sys.modules\n"
        f"try: cli.work(cli.Path({str(tmp_path / 'gone.yaml')!r}), once=True)\n"
        "except errors.ConfigError: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    )
    for chosen, wanted in (({}, "20"), ({"OPENBLAS_THREAD_TIMEOUT": "5"}, "5")):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")} | chosen
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        assert told.stdout.split() == [wanted]
