"""The metrics as text and as a file that is never incomplete."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sortd.daemon.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    """Counts of a little work."""
    metrics = Metrics()
    metrics.image("Tornillos", "filed")
    metrics.image("Tornillos", "filed")
    metrics.image("Tornillos", "sent_to_review")
    metrics.stage("decode", 0.02)
    metrics.set("sortd_backlog", 7, "Tornillos")
    metrics.set("sortd_prototypes_generation", 3, "Tornillos")
    metrics.count("sortd_watch_overflows")
    metrics.count("sortd_corrections", "Tornillos")
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


def test_metrics_of_a_dataset_that_is_gone_are_removed(metrics: Metrics) -> None:
    """Its gauges no longer say anything; its counters stay, as Prometheus expects of counters."""
    metrics.set("sortd_precision_ratio", 0.9, "Tornillos", "audit")
    metrics.set("sortd_backlog", 1, "Ropa")
    metrics.forget("Tornillos")
    found = samples(metrics.text())
    assert [key for key in found if "Tornillos" in key and key[0] != "sortd_images_total"] == [
        ("sortd_corrections_total", "Tornillos")
    ]
    assert found["sortd_backlog", "Ropa"] == 1


def test_metrics_of_a_model_are_those_of_the_last_one(metrics: Metrics) -> None:
    """A model that is loaded later replaces the first."""
    metrics.model("packaged", "first")
    metrics.model("packaged", "second")
    assert [set(key[1:]) for key in samples(metrics.text()) if key[0] == "sortd_model_info"] == [{"packaged", "second"}]


def test_metrics_keep_the_time_of_the_last_error(metrics: Metrics) -> None:
    """An error sets it, a warning does not, and nothing does after the end."""
    end = metrics.watch_errors()
    logging.getLogger("sortd.test").warning("a warning")
    before = samples(metrics.text())["sortd_last_error_timestamp_seconds",]
    logging.getLogger("sortd.test").error("an error")
    after = samples(metrics.text())["sortd_last_error_timestamp_seconds",]
    end()
    logging.getLogger("sortd.test").error("another error")
    assert (before, after > 0) == (0, True)
    assert samples(metrics.text())["sortd_last_error_timestamp_seconds",] == after


def test_metrics_that_nobody_reads_import_nothing() -> None:
    """A daemon without metrics does not hold prometheus_client in memory."""
    program = (
        "import sys; from sortd.daemon.metrics import Metrics; metrics = Metrics(is_on=False)\n"
        "metrics.image('A', 'filed'); metrics.set('sortd_ready', 1); metrics.stage('move', 1.0)\n"
        "metrics.model('', ''); metrics.forget('A'); print(repr(metrics.text()), 'prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["''", "False"]
