"""Prometheus is told whole truths: by a file that is never half, or over HTTP on this machine alone."""

import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sortd.daemon.reporting import Metrics
from tests.daemon_process import PATIENCE_SECONDS


@pytest.fixture
def metrics() -> Metrics:
    """Counts of a little work."""
    metrics = Metrics()
    metrics.image("Tornillos", "filed")
    metrics.image("Tornillos", "filed")
    metrics.image("Tornillos", "sent_to_review")
    metrics.stage("decode", 0.02)
    metrics.backlog("Tornillos", 7)
    metrics.generation("Tornillos", 3)
    metrics.watch_overflow()
    metrics.correction("Tornillos")
    return metrics


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_have_the_documented_names(metrics: Metrics) -> None:
    """Dashboards depend on the names."""
    found = samples(metrics.text())
    assert found["sortd_images_total", "Tornillos", "filed"] == 2
    assert found["sortd_images_total", "Tornillos", "sent_to_review"] == 1
    assert found["sortd_image_seconds_count", "decode"] == 1
    assert found["sortd_image_seconds_sum", "decode"] == 0.02
    assert found["sortd_backlog", "Tornillos"] == 7
    assert found["sortd_prototypes_generation", "Tornillos"] == 3
    assert found["sortd_watch_overflows_total",] == 1
    assert found["sortd_corrections_total", "Tornillos"] == 1
    assert not [name for name, *_ in found if name.endswith("_created")]


def test_two_metrics_do_not_share_counts(metrics: Metrics) -> None:
    """Each object has a registry of its own."""
    assert ("sortd_images_total", "Tornillos", "filed") not in samples(Metrics().text())
    assert metrics.text() != Metrics().text()


def test_textfile_is_complete_and_readable_by_all(metrics: Metrics, tmp_path: Path) -> None:
    """No other file remains, and the mode does not depend on the umask."""
    path = tmp_path / "sortd.prom"
    before = os.umask(0o077)
    try:
        metrics.write_textfile(os.fspath(path))
        metrics.image("Tornillos", "filed")
        metrics.write_textfile(os.fspath(path))
    finally:
        os.umask(before)
    assert samples(path.read_text())["sortd_images_total", "Tornillos", "filed"] == 3
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_textfile_that_cannot_be_written_keeps_the_old_one(metrics: Metrics, tmp_path: Path) -> None:
    """The error is raised, and no incomplete file remains."""
    (tmp_path / "sortd.prom").mkdir()
    with pytest.raises(IsADirectoryError):
        metrics.write_textfile(os.fspath(tmp_path / "sortd.prom"))
    with pytest.raises(FileNotFoundError):
        metrics.write_textfile(os.fspath(tmp_path / "absent" / "sortd.prom"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["sortd.prom"]


def test_serve_answers_on_the_loopback_until_closed(metrics: Metrics) -> None:
    """The port is bound to the loopback address and free after close."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    close = metrics.serve(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as answer:
        text = answer.read().decode()
    close()
    assert samples(text) == samples(metrics.text())
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1.0)


def test_healthz_reports_the_problem_of_the_daemon(metrics: Metrics) -> None:
    """It answers 503 with the problem or 200; the metrics are served in both cases."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    problems = ["loading the model", None]
    close = metrics.serve(port, problem=lambda: problems[0])
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE_SECONDS)
        assert (refused.value.code, refused.value.read()) == (503, b"loading the model\n")
        refused.value.close()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as counts:
            assert b"sortd_backlog" in counts.read()
        problems.pop(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE_SECONDS) as answer:
            assert (answer.status, answer.read()) == (200, b"ok\n")
    finally:
        close()


def test_dataset_name_that_is_not_utf8_is_a_label(metrics: Metrics, tmp_path: Path) -> None:
    """The name of a folder need not be UTF-8, but the metrics must be."""
    metrics.image("caf\udce9", "filed")
    metrics.write_textfile(os.fspath(tmp_path / "sortd.prom"))
    assert ("sortd_images_total", r"caf\udce9", "filed") in samples((tmp_path / "sortd.prom").read_text())


def test_textfile_is_not_written_through_a_link(tmp_path: Path) -> None:
    """In a folder that others can write only the file of that name is replaced."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("sortd.prom", f"sortd.prom.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(precious)
    Metrics().write_textfile(os.fspath(tmp_path / "sortd.prom"))
    assert precious.read_text() == "precious"
    assert not (tmp_path / "sortd.prom").is_symlink()
