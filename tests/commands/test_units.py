"""`sortd service`: what stands at the place of the unit is left alone unless sortd wrote it."""

import os
from pathlib import Path

import pytest

from tests.command_line import sortd


@pytest.mark.parametrize("kind", ["masked", "link to nowhere", "folder", "edited"])
def test_service_of_a_user_leaves_what_sortd_did_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`systemctl mask` makes a link; a link to nowhere is somebody's, too."""
    config = tmp_path / "sortd" / "config.yaml"
    unit = tmp_path / "systemd" / "user" / "sortd.service"
    for folder in (config.parent, unit.parent):
        folder.mkdir(parents=True)
    config.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", os.fspath(tmp_path))
    match kind:
        case "folder":
            unit.mkdir()
        case "edited":
            unit.write_text("[Service]\n")
        case _:
            unit.symlink_to("/dev/null" if kind == "masked" else tmp_path / "nowhere")
    installed = sortd("service", "install", "--user", "--dry-run")
    assert (installed.code, installed.out) == (78, "")
    assert f"{unit} was not written by sortd, or was edited" in installed.err
    removed = sortd("service", "uninstall", "--user", "--dry-run")
    assert (removed.code, f"{unit} was edited and stays" in removed.out) == (0, True)
