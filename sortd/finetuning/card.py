"""The model card of a fine-tuned model: data, recipe, figures and limits, for whoever opens its folder in a year."""

from collections.abc import Mapping
from typing import Any

TEMPLATE = "model_card.md.j2"


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown, from what ``metrics.json`` holds and the run's own facts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sortd", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701 - Markdown
    environment.filters["share"] = _share
    accuracy, images = facts["comparison"]["finetuned_accuracy"], facts["comparison"]["images"]
    margin = 196.0 * (max(accuracy * (1 - accuracy), 0.25 / images) / images) ** 0.5
    text = environment.get_template(TEMPLATE).render(facts, figures=_figures, margin=margin)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _figures(row: Mapping[str, Any]) -> str:
    shares = [_share(row[key]) for key in ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error")]
    return " | ".join([*shares, f"{row['log_loss']:.3f}"])


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
