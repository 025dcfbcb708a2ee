"""The command line as a whole: what there is, what it costs, and how it fails."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sortd.commands.console import counted, megabytes, printable
from sortd.commands.run import raise_descriptor_limit
from tests.command_line import sortd, write_config
from tests.daemon_process import PATIENCE_SECONDS, make_dataset
from tests.filed_images import file_images

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "run", "once", "check", "status", "explain", "eval", "history", "undo", "release", "init", "rebuild", "models",
    "version", "config", "service", "notify",
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
def test_help_of_each_command_has_usage_and_config(command: str) -> None:
    """Every command but ``version`` and ``service`` has the option ``--config``."""
    ran = sortd(command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out
    if command not in {"version", "service"}:
        assert "--config" in ran.out


@pytest.mark.parametrize("arguments", [(), ("models",), ("models", "promote"), *((name,) for name in sorted(COMMANDS))])
def test_help_of_a_flag_shows_no_type(arguments: tuple[str, ...]) -> None:
    """A flag takes no value, so its help shows no type."""
    assert "bool" not in sortd(*arguments, "--help").out


def test_help_lists_all_commands() -> None:
    """No command is hidden, and each is known to these tests."""
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
        ("notify", "-c"),
    ],
)
def test_commands_that_read_facts_import_nothing_slow(config: Path, arguments: tuple[str, ...]) -> None:
    """Commands that only read facts do not import torch, which takes seconds."""
    given = [*arguments, str(config)] if arguments[-1] == "-c" else [*arguments]
    code = (
        "import sys; from sortd.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(sorted({SLOW!r} & set(sys.modules)), file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stderr.splitlines()[-1] == "[]"


def test_raise_descriptor_limit_takes_what_the_process_may_have() -> None:
    """The soft limit, 1024 most often, is raised to the hard one, and no further."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_error_prints_a_message_and_no_traceback(tmp_path: Path) -> None:
    """An error that the user can correct goes to stderr without a traceback, with its exit code."""
    gone = run("status", "-c", tmp_path / "gone.yaml")
    assert gone.returncode == 78
    assert gone.stderr.startswith(f"sortd: {tmp_path / 'gone.yaml'}: cannot be read")
    assert gone.stdout == ""
    assert run("status", "--nonsense").returncode == 2
    assert run("nonsense").returncode == 2


def test_closed_pipe_on_stdout_is_no_error(config: Path) -> None:
    """``sortd history | head -0`` prints no error."""
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


def test_full_disk_on_stdout_prints_a_message(config: Path) -> None:
    """Output that cannot be written ends with the exit code of storage, without a traceback."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "sortd", "history", "-c", str(config)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert ran.returncode == 74
    assert ran.stderr.startswith("sortd: the output cannot be written: No space left on device")
    assert ran.stderr.count("\n") == 1


def test_closed_stdout_is_not_reused_by_another_file(config: Path) -> None:
    """With standard output closed nothing is printed into the next opened file, and the exit code is the same."""
    command = f"exec {sys.executable} -m sortd status -c '{config}' >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, cwd=ROOT).returncode == 75


def test_version_option_and_command_agree() -> None:
    """The option ``--version`` and the command ``version`` print the same."""
    assert sortd("--version").out == sortd("version").out != ""


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "x/../../../out", "..", "a\nb", "a  b ", " a", "a  b", " "])
def test_init_with_an_invalid_class_name_creates_nothing(tmp_path: Path, name: str) -> None:
    """The invalid name is reported before anything is created, and no name leads out of the dataset."""
    ran = sortd("init", tmp_path / "Garden", "--class", "roses", "--class", name)
    assert ran.code == 2
    assert "cannot be a class" in " ".join(ran.err.split())
    assert not any(tmp_path.iterdir())


def test_init_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    """A file of that name, or in place of the parent, is reported with what to do."""
    (tmp_path / "file").touch()
    for place, why in (("file", "is no folder"), ("file/Garden", "cannot be created: Not a directory")):
        ran = sortd("init", tmp_path / place)
        assert (ran.code, why in ran.err) == (78, True)


def command_of(out: str) -> str:
    """Return the command that `sortd init` tells to run."""
    (line,) = [line.strip() for line in out.splitlines() if line.startswith("    ")]
    return line


def test_init_prints_a_command_that_works(tmp_path: Path) -> None:
    """The printed command runs sortd on the new dataset from any folder."""
    garden = tmp_path / "my pictures" / "Garden"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    init = [sys.executable, "-m", "sortd", "init", str(garden), "--class", "roses", "--class", "tulips"]
    made = subprocess.run(init, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    command = ["sh", "-c", f"exec env {command_of(made.stdout)}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as run:
        assert run.stderr is not None
        ends = {"dataset.added", "daemon.stopped"}
        heard = next(line for line in map(json.loads, run.stderr) if line["event"] in ends)
        run.terminate()
        run.stderr.read()
    assert (heard["event"], heard.get("root"), run.returncode) == ("dataset.added", str(garden), 0)


@pytest.mark.parametrize("configured", ["nowhere", "here", "elsewhere"])
def test_init_command_names_the_configuration_unless_it_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str
) -> None:
    """The command names a configuration with the root of the new dataset, or the user's own has it."""
    site, here = tmp_path / "my pictures", tmp_path / "here"
    here.mkdir()
    if configured != "nowhere":
        write_config(here, root=site if configured == "here" else tmp_path / "Data")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    words = shlex.split(command_of(sortd("init", site / "Garden").out))
    assert ("-c" in words) == (configured != "nowhere")
    arguments = words[words.index("run") + 1 :]
    monkeypatch.chdir(tmp_path)
    found = sortd("status", "--json", *arguments).facts["datasets"]
    assert [one["root"] for one in found.values()] == [str(site / "Garden")]


def test_init_with_an_invalid_configuration_reports_its_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset is created, and the mistakes that would stop the next command are printed."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, speed="fast")
    ran = sortd("init", tmp_path / "Data" / "Garden")
    assert ran.code == 78
    assert "Garden is a dataset" in ran.out
    assert "speed" in ran.err


@pytest.mark.parametrize(
    "place", ["Garden/Inner", "Garden/Images/Inner", "Garden/Clases/roses", ".Garden", "link/Inner"]
)
def test_init_of_a_dataset_that_sortd_would_ignore_is_refused(tmp_path: Path, place: str) -> None:
    """Inside another dataset, also by a link, or hidden: nothing is created, and the message names another place."""
    (tmp_path / "Garden" / "Clases" / "roses").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "Garden")
    before = sorted(tmp_path.rglob("*"))
    ran = sortd("init", tmp_path / place)
    assert ran.code == 78
    assert (
        ("not hidden" in ran.err) if place == ".Garden" else f"lies inside the dataset {tmp_path / 'Garden'}" in ran.err
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", ["status", "history", "models list", "check"])
def test_commands_report_a_dataset_inside_another(tmp_path: Path, arguments: str) -> None:
    """It is ignored, so each command says so, with the sentence of `sortd init`."""
    inner = make_dataset(tmp_path / "Data") / "Inner"
    (inner / "Clases").mkdir(parents=True)
    ran = sortd(*arguments.split(), "-c", write_config(tmp_path))
    said = " ".join((ran.out + ran.err).split())
    assert f"lies inside the dataset {inner.parent}" in said
    assert f"set `root` to {inner.parents[1]}, with every dataset directly in it" in said


@pytest.mark.parametrize("arguments", ["status", "history", "models list", "models", "eval", "check"])
def test_config_option_may_stand_before_the_command(tmp_path: Path, arguments: str) -> None:
    """Before the command or its group it means the same; after the command it comes first."""
    gone, *words = tmp_path / "gone.yaml", *arguments.split()
    for given in (["-c", gone, *words], [*words, "-c", gone], ["-c", "x.yaml", *words, "-c", gone]):
        ran = sortd(*given)
        assert (ran.code, f"{gone}" in ran.out + ran.err) == (78, True), given


@pytest.mark.parametrize("command", ["eval", "audit", "groups", "rebuild", "reconsider", "export --out x", "finetune"])
def test_dataset_is_named_by_the_option_or_as_it_once_was(config: Path, command: str) -> None:
    """Both spellings name the dataset, and two names are a mistake in the usage."""
    spelled = [sortd(*command.split(), *given, "-c", config) for given in (["--dataset", "No"], ["No"])]
    assert {ran.code for ran in spelled} <= {65, 75}
    assert spelled[0] == spelled[1]
    assert sortd(*command.split(), "--dataset", "No", "No", "-c", config).code == 2
    assert sortd(*command.split(), "No", "Neither", "-c", config).code == 2


@pytest.mark.parametrize("inside", ["", "Clases/roses"])
@pytest.mark.parametrize(
    "arguments",
    ["run", "once", "once --dry-run", "status", "eval", "history", "undo --last 1", "release --all", "rebuild",
     "explain config.yaml", "finetune Garden", "models", "models promote", "bench"],
)  # fmt: skip
def test_commands_on_a_root_that_is_a_dataset_are_refused(tmp_path: Path, arguments: str, inside: str) -> None:
    """Each command reports what to set, and does not advise to create a dataset inside."""
    dataset = tmp_path / "Garden"
    (dataset / "Clases" / "roses").mkdir(parents=True)
    (dataset / "Images").mkdir()
    file = write_config(tmp_path, root=dataset / inside)
    ran = sortd(*arguments.split(), "-c", file)
    assert ran.code == 78
    assert ("is itself a dataset" in ran.err) if not inside else f"lies inside the dataset {dataset}" in ran.err
    assert f"set `root` to {tmp_path}" in ran.err
    assert "init" not in ran.err


def test_root_with_datasets_and_a_clases_folder_is_used(tmp_path: Path) -> None:
    """A folder Clases next to datasets does not disable them; `sortd check` reports it."""
    make_dataset(tmp_path / "Data")
    (tmp_path / "Data" / "Clases").mkdir()
    file = write_config(tmp_path)
    assert list(sortd("status", "-c", file, "--json").facts["datasets"]) == ["Colours"]
    assert "is itself a dataset" in sortd("check", "-c", file).out


def test_status_shows_its_configuration_and_a_missing_root(config: Path, tmp_path: Path) -> None:
    """Status shows the file that it read, and does not call an unmounted root empty."""
    facts = sortd("status", "-c", config, "--json").facts
    assert facts["config"] == str(config)
    assert f"config    {config}" in sortd("status", "-c", config).out
    write_config(tmp_path, root=tmp_path / "gone")
    assert f"{tmp_path / 'gone'} is missing" in sortd("status", "-c", config).out


def test_empty_result_prints_a_message_on_stderr(config: Path) -> None:
    """An empty result is reported on stderr."""
    assert "no such move" in sortd("history", "-c", config, "--label", "none").err
    assert "nothing is held" in sortd("release", "--all", "-c", config).err


@pytest.fixture
def public_config(config: Path, public_folder: Path) -> Path:
    """The configuration and all that it names, where other users may read it."""
    place = shutil.copytree(config.parent, public_folder / "place", symlinks=True)
    copied: Path = place / config.name
    copied.write_text(config.read_text().replace(str(config.parent), str(place)))
    return copied


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["models", "check"])
def test_cache_without_read_permission_is_reported(public_config: Path, command: str) -> None:
    """There is no traceback, and `check` continues with its other checks."""
    config = public_config
    cache = config.parent / "cache"
    cache.mkdir(exist_ok=True)
    os.chown(cache, 65533, 65533)
    cache.chmod(0o700)
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    ran = subprocess.run(
        [*without, sys.executable, "-m", "sortd", command, "-c", str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    told = ran.stdout + ran.stderr
    assert "Traceback" not in told
    assert f"{cache}" in told
    assert ran.returncode == (78 if command == "check" else 74)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["status", "history", "check"])
def test_state_without_read_permission_is_reported(public_config: Path, command: str) -> None:
    """A user without permission gets a message."""
    config = public_config
    (config.parent / "state").chmod(0o700)
    sortd(command, "-c", config)  # imports all that is needed: another user may not be allowed to read this Python
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        ran = sortd(command, "-c", config)
        os._exit(ran.code if "cannot be read" in ran.out + ran.err else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 78


def test_models_without_network_lists_local_models(config: Path, tmp_path: Path) -> None:
    """The list has the local models, the chosen one, and how to get more."""
    write_config(tmp_path, model="auto")
    facts = sortd("models", "-c", config, "--json", environment={"HF_HOME": str(tmp_path / "none")}).facts
    assert facts["model"] == "auto"
    assert facts["why"]
    assert sortd("models", "list", "-c", config).code == 0


def test_models_lists_a_configured_folder_as_chosen(config: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """A folder that only the configuration names is one of the models."""
    write_config(tmp_path, model=tiny_clip)
    chosen = [one for one in sortd("models", "-c", config, "--json").facts["models"] if one["chosen"]]
    assert [one["folder"] for one in chosen] == [str(tiny_clip)]
    assert len(chosen[0]["content"]) == 16
    write_config(tmp_path, model=tmp_path / "nowhere")
    assert "nowhere does not exist" in sortd("models", "-c", config, "--json").facts["problem"]


def test_printable_escapes_control_and_undecodable_characters() -> None:
    """Control characters, direction marks and undecodable bytes are escaped, letters are not."""
    assert printable("señal.png") == "señal.png"
    assert printable("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"
    assert printable(os.fsdecode(b"\xff")) == "\\xff"


def test_counted_and_megabytes_format_numbers() -> None:
    """Plurals, thousands separators and units are right."""
    assert [counted(1, "image"), counted(2000, "class"), counted(0, "copy")] == ["1 image", "2,000 classes", "0 copies"]
    assert [megabytes(10), megabytes(2_500), megabytes(9.9e6), megabytes(3e9)] == ["10 B", "2.5 kB", "9.9 MB", "3.0 GB"]


def test_work_sets_the_openblas_timeout_before_numpy_is_loaded(tmp_path: Path) -> None:
    """OpenBLAS reads the variable when numpy is loaded; a value of the user is kept."""
    code = (
        "import os, sys\n"
        "from sortd import cli, errors\n"
        "assert 'numpy' not in sys.modules\n"
        f"try: cli.once(cli.Path({str(tmp_path / 'gone.yaml')!r}))\n"
        "except errors.ConfigError: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    )
    for chosen, wanted in (({}, "20"), ({"OPENBLAS_THREAD_TIMEOUT": "5"}, "5")):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")} | chosen
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        assert told.stdout.split() == [wanted]


def test_models_export_without_onnx_runtime_is_refused_first(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The missing package is reported before the expected duration."""
    for missing in ("onnxruntime", "onnx"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            ran = sortd("models", "export", "-c", config)
        assert (ran.code, "sortd-images[onnx]" in ran.err, caplog.messages) == (69, True, [])


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (("run",), "speed: fast"),
        (("once",), "root: /nowhere/at/all"),
        (("run",), "state_dir: /dev/null/x"),
        (("once", "--dry-run"), "root: ["),
    ],
)
def test_every_line_of_a_log_in_json_is_json(tmp_path: Path, arguments: tuple[str, ...], mistake: str) -> None:
    """The error that ends the run is in its last line, with the exit code, whatever was known of the configuration."""
    make_dataset(tmp_path / "Data", references=1)
    keys = {"root": tmp_path / "Data", "state_dir": tmp_path / "state", "cache_dir": tmp_path / "cache"}
    key, _, value = mistake.partition(": ")
    text = "".join(f"{name}: {wanted}\n" for name, wanted in {**keys, key: value}.items())
    (tmp_path / "config.yaml").write_text(text)
    command = [sys.executable, "-m", "tests.fast_sortd", *arguments, "-c", str(tmp_path / "config.yaml")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE_SECONDS)
    *_, last = map(json.loads, ran.stderr.splitlines())
    assert (last["event"], last["level"], last["exit_code"]) == ("daemon.failed", "error", ran.returncode)
    assert ran.returncode in {69, 73, 74, 78}
    assert last["error"]
