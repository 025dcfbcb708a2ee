"""The dashboard and the alert rules use metrics that sortd has, and Prometheus accepts them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sortd.daemon.metrics import Metrics

FOLDER = Path(__file__).parents[1] / "docs" / "monitoring"
NAME = re.compile(r"\bsortd_\w+")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return the name of each series of the real output."""
    metrics = Metrics()
    metrics.stage("move", 1.0)
    families = re.findall(r"^# TYPE (\S+) (\S+)$", metrics.text(), re.MULTILINE)
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"{name}{part}" for name, kind in families for part in parts.get(kind, ("",))}


def expressions_of_the_dashboard() -> list[str]:
    """Return every query of a panel or a variable."""
    board = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
    queries = [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + queries


def expressions_of_the_rules() -> list[str]:
    """Return the expression of every alert."""
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def promtool(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool in the folder, or skip the test."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run(
        ["promtool", *arguments], input=given, cwd=FOLDER, capture_output=True, text=True, check=False
    )


def test_dashboard_and_rules_use_metrics_that_exist(known: set[str]) -> None:
    """A metric that is renamed is renamed there."""
    used = {name for text in expressions_of_the_dashboard() + expressions_of_the_rules() for name in NAME.findall(text)}
    assert used - known == set()


def test_dashboard_shows_every_metric(known: set[str]) -> None:
    """What is measured can be seen."""
    shown = {name for text in expressions_of_the_dashboard() for name in NAME.findall(text)}
    assert known - shown == {"sortd_image_seconds_sum", "sortd_image_seconds_count"}


def test_dashboard_panels_have_titles_ids_and_places_of_their_own() -> None:
    """No panel lies upon another."""
    panels = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))["panels"]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_table_names_every_metric(known: set[str]) -> None:
    """The document says what each metric is."""
    text = (FOLDER / "README.md").read_text("utf-8")
    named = set(re.findall(r"^\| `(sortd_\w+)`", text, re.MULTILINE))
    assert named == {re.sub(r"_(bucket|sum|count)$", "", name) for name in known}


def test_rules_pass_promtool_and_their_tests() -> None:
    """Each alert begins when it should, and not in a sortd that works."""
    checked, tested = promtool("check", "rules", "alerts.yaml"), promtool("test", "rules", "alerts.test.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_rules_have_a_test_each() -> None:
    """No alert is untested, neither its begin nor its silence."""
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    """Prometheus can parse them, with the variables of Grafana replaced."""
    rules = [
        {"record": f"query:{at}", "expr": text.replace("$__rate_interval", "5m")}
        for at, text in enumerate(expressions_of_the_dashboard())
        if not text.startswith("label_values(")
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
