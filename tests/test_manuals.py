"""The man pages and completions that `packaging/generate.py` writes, read by man, lexgrog and bash."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all files."""
    out = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, REPOSITORY / "packaging" / "generate.py", out], check=True, cwd=out)
    return out


def test_manual_of_each_command_has_its_help(generated: Path) -> None:
    """A page for each command and those below it, with its options and their help."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in (generated / "man").iterdir()}
    assert {"sortd.1", "sortd-init.1", "sortd-models.1", "sortd-models-fetch.1", "sortd-service-install.1"} <= {*pages}
    assert ".B \\-\\-dry\\-run\nShow what would happen; change nothing." in pages["sortd-once.1"]
    assert "/etc/sortd/config.yaml" in pages["sortd.1"]


@pytest.mark.skipif(shutil.which("man") is None or shutil.which("lexgrog") is None, reason="man is not here")
def test_manuals_are_formatted_without_a_warning(generated: Path) -> None:
    """Groff understands each line, and the index finds a name and a purpose."""
    pages = sorted((generated / "man").iterdir())
    read = subprocess.run(["lexgrog", *pages], capture_output=True, text=True, check=False)
    assert (read.returncode, len(read.stdout.splitlines())) == (0, len(pages)), read.stdout
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANROFFOPT": "", "MANWIDTH": "100"}
    command = ["man", "--warnings", "--local-file", "--pager=cat", *map(os.fspath, pages)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "sortd-once - File the images" in shown.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_completion_of_bash_completes_commands_and_options(generated: Path, tmp_path: Path) -> None:
    """The script calls sortd, which lists what begins so."""
    program = tmp_path / "sortd"
    code = "import sys; sys.argv[0] = 'sortd'; from sortd.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    script = (
        f". {shlex.quote(os.fspath(generated / 'completions' / 'sortd.bash'))}\n"
        "for words in 'sortd reco' 'sortd once --dr'; do COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        '_sortd_completion sortd; echo "${COMPREPLY[@]}"; done'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.fspath(REPOSITORY)}
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["reconsider", "--dry-run"]
