"""The command ``explain``: explain the decision on one image, without changing anything."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sortd.arrays import FloatArray
from sortd.classify.explain import Explanation, explain, explain_finetuned, explanation_sentences
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import PROBABILISTIC
from sortd.commands.console import decimals, format_time, print_line, print_table, printable, say, show, spinner
from sortd.commands.evaluation import check_page_path, render, write_page
from sortd.commands.moves import JournalPlace, dataset_at, journal_of, record_facts
from sortd.commands.status import dataset_named, serving_facts, settings_with_corrections
from sortd.config import Config
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import (
    SETTINGS,
    References,
    ReferencesAbsentError,
    changed_since,
    class_labels,
    stored_prototypes,
)
from sortd.daemon.resources import ActiveClassifier, LoadEncoder, Resources, reference_settings_of, select_classifier
from sortd.errors import DataError, UnreadableError
from sortd.events import LIKE_NO_CLASS, Abstained, Assigned, EmbeddedImage, Stamp
from sortd.images.thumbnails import thumbnails
from sortd.layout import Area, Layout, Reason, Why
from sortd.moving.fs import is_version
from sortd.service import read_status
from sortd.store.cache import CACHE_FILE, Cache
from sortd.store.history import History
from sortd.store.records import Selection
from sortd.watch.scan import stamp, why_left

CLASSES_SHOWN = 10
CLASSES_AT_MOST = 40
"""Largest number of classes on the page of one decision."""
LARGE_SIDE_PIXELS = 400


@dataclass(frozen=True, slots=True)
class ImageExplanation:
    """The explanation of the decision on an image, and the moves of the image."""

    path: str
    dataset: str
    content: str
    explanation: Explanation
    is_stored: bool
    """Whether stored prototypes were used; else they were built for this command."""
    records: tuple[dict[str, Any], ...]  # moves of this file or of the same content, newest first
    refusal: str | None = None  # why the configured fine-tuned model is not used
    left: Why | None = None  # why the file is left in Images/

    def facts(self) -> dict[str, Any]:
        """Return the explanation as plain values."""
        explanation = self.explanation
        values = asdict(explanation)
        other_modes, decision = values.pop("others"), values.pop("decision")
        decision.pop("best_label", None)
        return {
            "path": self.path,
            "dataset": self.dataset,
            "content": self.content,
            "reason": "",
            **decision,
            **values,
            "outcome": "left" if self.left else "filed" if explanation.is_filed else "sent_to_review",
            "left": None if self.left is None else {"reason": str(self.left.reason), "message": self.left.message},
            "label": explanation.label,
            "classifier": "finetuned" if explanation.mode == "finetuned" else "prototypes",
            "refusal": self.refusal,
            "generation": explanation.generation if self.is_stored else None,
            "other_modes": other_modes,
            "sentences": list(self.sentences()),
            "history": list(self.records),
        }

    def sentences(self) -> list[str]:
        """Return the explanation in sentences."""
        said = explanation_sentences(self.explanation)
        if self.left is not None:
            said[:1] = [f"It stays in Images/: {self.left.message}.", f"Otherwise it would {self._fate}."]
        if self.refusal is not None:
            said.append(f"The prototypes decide, since the fine-tuned model was refused: {self.refusal}.")
        if self.path in {one.path for one in self.explanation.neighbours}:
            said.append("The image is itself a reference, which increases its scores.")
        if not self.is_stored:
            said.append("The prototypes were built for this command: none are stored for the current references.")
        return said

    @property
    def _fate(self) -> str:
        match self.explanation.decision:
            case Assigned(label=label):
                return f"be filed into {label}"
            case Abstained(best_label=None):
                return "not be decided"
            case Abstained() as decision:
                return f"go to Review/{decision.review_folder}"


def explain_image(
    config: Config,
    path: Path,
    dataset: str | None = None,
    *,
    load_encoder: LoadEncoder | None = None,
    only_stored: bool = False,
) -> ImageExplanation:
    """Return the explanation of an image; a model is loaded only if its embedding or the prototypes are not stored.

    Default of ``dataset``: that of the image, or the only one; ``load_encoder`` replaces the configured model. With
    ``only_stored`` no model is loaded.

    Raises:
        DataError: there is no such file or dataset, the dataset has no references, or with ``only_stored`` the
            embedding or the prototypes are not stored.
        UnreadableError: the file cannot be embedded.
        ModelError: the model is not available.
    """
    absolute = os.path.abspath(path)
    mark = stamp(absolute)
    left = why_kept(config, path)
    if mark is None:
        why = "there is no such file, or it is a folder; give the path of an image"
        if left is not None:
            why = f"it stays in Images/: {left.message}"
        elif os.path.islink(absolute):
            why = "it is a symbolic link; give the path of the file"
        raise DataError(f"{absolute}: {why}")
    layout = _dataset(config, path, dataset)
    with open(absolute, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        sight = _remembered(config, layout, content)
        if sight is None and only_stored:
            raise DataError(f"{absolute} is not embedded yet with the current references; `sortd explain` does it now")
        sight = sight or _looked_at(config, layout, (absolute, mark), load_encoder)
    except UnreadableError as error:
        if left is None:
            raise
        raise UnreadableError(f"{absolute} stays in Images/: {left.message}") from error
    records = _records(config, layout, mark, content)
    return ImageExplanation(
        path=absolute,
        dataset=layout.name,
        content=content,
        explanation=_explanation(config, layout, sight, _turned_away(absolute, records)),
        is_stored=sight.is_stored,
        records=tuple(records),
        refusal=sight.decider.refusal,
        left=left,
    )


def why_kept(config: Config, path: Path) -> Why | None:
    """Return why a file in Images/ is left there: by its name, its place or a hold; None if it is not."""
    found = dataset_at(config, path)
    if found is None or not found[1].startswith(f"{Area.IMAGES.value}/"):
        return None
    layout, relative = found
    here = os.path.join(layout.root, relative)
    if (why := why_left(here, os.fspath(layout.root))) is not None:
        return why
    with journal_of(config, layout).open() as history:
        held = history.held_version(relative)
    if held is None or not os.path.lexists(here) or not is_version(os.lstat(here), held):
        return None
    return Why(Reason.HELD, f"it is held until it changes or is released: sortd release {here}")


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """An image as the classifiers of its dataset see it."""

    decider: ActiveClassifier
    prototypes: PrototypeSet
    is_stored: bool
    embedding: FloatArray | None
    logits: FloatArray | None


def _turned_away(path: str, records: Sequence[Mapping[str, Any]]) -> int:
    """Return the generation for which an image of Review/ looked like no class; 0 for another image."""
    last = next((one for one in records if one["to"] == path), None)
    return last["generation"] if last is not None and last["reason"] in LIKE_NO_CLASS else 0


def _explanation(config: Config, layout: Layout, sight: _Sight, turned_away: int) -> Explanation:
    abstain = reference_settings_of(config.dataset(layout.name)).settings.abstain
    classifier = sight.decider.classifier(abstain, generation=sight.prototypes.generation)
    if classifier is None:
        assert sight.embedding is not None
        return explain(sight.prototypes, sight.embedding, turned_away=turned_away)
    assert sight.logits is not None
    return explain_finetuned(classifier, sight.logits, prototypes=sight.prototypes, embedding=sight.embedding)


def _dataset(config: Config, path: Path, name: str | None) -> Layout:
    if name is not None:
        return dataset_named(config, name)
    if (found := dataset_at(config, path)) is not None:
        return found[0]
    try:
        return dataset_named(config, None)
    except DataError as error:
        raise DataError(f"{path} is in no dataset; {error}") from None


def _remembered(config: Config, layout: Layout, content: str) -> _Sight | None:
    """Return the cached embedding and logits of a content with stored prototypes, or None if one is missing."""
    if (prototypes := current_prototypes(config, layout)) is None:
        return None
    wanted = config.dataset(layout.name).classifier
    decider = select_classifier(layout, config.state_dir, wanted, _labels(layout, prototypes))
    ids = (prototypes.encoder_id, decider.model_id)
    embedding, logits = (stored_rows(config, {content}, one).get(content) for one in ids)
    if (embedding if decider.facts is None else logits) is None:
        return None
    return _Sight(decider, prototypes, is_stored=True, embedding=embedding, logits=logits)


def stored_rows(config: Config, contents: Iterable[str], encoder_id: str) -> dict[str, FloatArray]:
    """Return the embeddings that the cache has, by content; create no cache for it."""
    file = config.cache_dir / CACHE_FILE
    if not file.is_file():
        return {}
    with Cache(file, report=lambda _: None) as cache:
        return cache.embeddings(set(contents), encoder_id)


def _looked_at(config: Config, layout: Layout, image: tuple[str, Stamp], load_encoder: LoadEncoder | None) -> _Sight:
    """Embed the image with the models, and build prototypes if none are stored for this encoder."""
    with Resources(config, load_encoder=load_encoder) as resources:
        embedder = resources.embedder()
        embedding = _row(embedder, image)
        prototypes, wanted = current_prototypes(config, layout), config.dataset(layout.name).classifier
        decider = resources.select(layout, wanted, _labels(layout, prototypes))
        logits = None if decider.facts is None else _row(resources.finetuned[decider.model_id], image)
        if prototypes is not None and prototypes.encoder_id == embedder.encoder.encoder_id:
            return _Sight(decider, prototypes, is_stored=True, embedding=embedding, logits=logits)
        references = References(layout.area(Area.CLASES))
        rebuilt = references.rebuild(embedder, settings_with_corrections(config, layout), previous=None, generation=0)
    return _Sight(decider, rebuilt.prototypes, is_stored=False, embedding=embedding, logits=logits)


def current_prototypes(config: Config, layout: Layout) -> PrototypeSet | None:
    """Return the stored prototypes if a running sortd uses them, or if they are up to date.

    Settings are irrelevant if a fine-tuned model decides: then prototypes only provide neighbours.
    """
    prototypes = stored_prototypes(config, layout)
    changed = None if prototypes is None else changed_since(config, layout, prototypes)
    if changed is None or (changed == SETTINGS and serving_facts(config, layout)["deciding"] == "finetuned"):
        return prototypes
    status = read_status(config.state_dir)
    return prototypes if status is not None and status["alive"] else None


def _labels(layout: Layout, prototypes: PrototypeSet | None) -> tuple[str, ...]:
    """Return the class folders, or the labels of the prototypes if ``Clases/`` is not mounted."""
    try:
        return class_labels(layout.area(Area.CLASES))
    except ReferencesAbsentError:
        if prototypes is None:
            raise
        return prototypes.labels


def _row(embedder: Embedder, image: tuple[str, Stamp]) -> FloatArray:
    (answer,) = embedder.embed([image])
    if not isinstance(answer, EmbeddedImage):
        raise UnreadableError(f"{image[0]} cannot be decided: {answer.message} ({answer.refusal.value})")
    return answer.embedding


def _records(config: Config, layout: Layout, mark: Stamp, content: str) -> list[dict[str, Any]]:
    """Return the moves of this file, or else of the last file with this content."""
    place = journal_of(config, layout)
    with place.open() as history:
        last = history.last_known(mark, content)
        return [] if last is None else _moves_back(place, history, last.destination_path)


def _moves_back(place: JournalPlace, history: History, path: str) -> list[dict[str, Any]]:
    """Return the moves that brought a file to its path, newest first."""
    moves: list[dict[str, Any]] = []
    newest = float("inf")
    while True:
        came = [one for one in history.moves(Selection(path=path)) if one.destination_path == path and one.id < newest]
        if not came:
            return moves
        moves.append(record_facts(place, came[0]))
        path, newest = came[0].source_path, came[0].id


def show_explanation(config: Config, image: Path, dataset: str | None, html: Path | None, *, as_json: bool) -> None:
    """Explain the decision on an image, write the page, and print the explanation."""
    check_page_path(html)
    with spinner("reading the image"):
        facts = explain_image(config, image, dataset).facts()
    if html is not None:
        write_page(html, explain_page(facts, now=datetime.now().astimezone()))
    show(facts, _print_explained, as_json=as_json)


def _print_explained(facts: Mapping[str, Any]) -> None:
    print_line(printable(facts["path"]), style="bold")
    first, *rest = facts["sentences"]
    print_line(printable(first), style="bold green" if facts["outcome"] == "filed" else "bold yellow")
    for sentence in rest:
        print_line(printable(sentence))
    print_line("")
    scores = facts["scores"][:CLASSES_SHOWN]
    rows = [(one["label"], decimals(one["score"]), decimals(one["nearest"]), one["references"]) for one in scores]
    print_table(("class", "score", "nearest", "references"), rows, right=("score", "nearest", "references"))
    if len(facts["scores"]) > len(scores):
        say(f"sortd: {len(facts['scores']) - len(scores)} more classes; --json prints all")
    print_line("")
    near = [(one["label"], f"{one['similarity']:.3f}", one["path"]) for one in facts["neighbours"]]
    print_table(("nearest references", "cosine", "file"), near, right=("cosine",))
    for record in facts["history"]:
        done = record["outcome"].replace("_", " ")
        print_line(f"{format_time(record['at'])} {done}: {printable(record['from'])} -> {printable(record['to'])}")


def explain_page(facts: Mapping[str, Any], *, now: datetime) -> str:
    """Return the page of one explanation, from ``ImageExplanation.facts``."""
    path, scores = facts["path"], facts["scores"][:CLASSES_AT_MOST]
    largest = max((one["score"] for one in scores), default=0.0)
    return render(
        "explain.html",
        now,
        facts=facts,
        image=thumbnails([path], side_pixels=LARGE_SIDE_PIXELS).get(path),
        unit="probability" if facts["mode"] in PROBABILISTIC else "cosine",
        scores=[{**one, "width": 100 * max(one["score"], 0.0) / largest if largest > 0 else 0.0} for one in scores],
        hidden=len(facts["scores"]) - len(scores),
        images=thumbnails(one["path"] for one in facts["neighbours"]),
    )
