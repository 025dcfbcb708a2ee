"""A daemon whose model takes images only decides by references, and refuses a mode that needs class names."""

import signal
from collections.abc import Callable
from pathlib import Path

from tests.command_line import sortd
from tests.daemon_process import COLOURS, picture, running
from tests.hub_folders import build_dinov2

Write = Callable[..., Path]


def test_daemon_with_encoder_of_images_files_by_references(colours: Path, write_config: Write, tmp_path: Path) -> None:
    """``mixed`` means ``best``; ``text`` is refused at a reload, at a start and by check, with the reason."""
    model = build_dinov2(tmp_path / "dinov2")
    config = write_config(model=model, device="cpu", mode="mixed")
    with running(config, program="sortd") as daemon:
        for number, colour in enumerate(COLOURS):
            path = colours / "Images" / f"{colour}.png"
            picture(colour, 100 + number).save(path)
            line = daemon.wait_for("image.filed", path=str(path))
            assert line["encoder_id"].startswith("dinov2-24-torch-")
        write_config(model=model, device="cpu", mode="text")
        daemon.send(signal.SIGHUP)
        refused = daemon.wait_for("config.refused")["error"]
        assert "`mode: text` decides by class names" in refused
        assert "takes images only" in refused
        picture("red", 200).save(colours / "Images" / "later.png")
        daemon.wait_for("image.filed", path=str(colours / "Images" / "later.png"))
        assert daemon.stop() == 0
    ran = sortd("once", "--config", config)
    assert ran.code == 78
    found = sortd("check", "--config", config, "--json")
    assert any("takes images only" in str(finding) for finding in found.facts["findings"])
