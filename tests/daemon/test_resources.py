"""The models of a run: the configured one for prototypes, and a fine-tuned one for datasets that it decides."""

import json
import os
import queue
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.arrays import FloatArray, Pixels
from sortd.classify.types import DecisionSettings
from sortd.commands.run import simulate
from sortd.config import Config, read_config
from sortd.daemon.resources import PrototypeStore, Resources, reference_settings_of, select_classifier
from sortd.daemon.worker import Answer, EmbedJob, Forget, Posted, RebuildJob, Worker, WorkerDied
from sortd.encoder.finetuned import FACTS_FILE, FinetunedFacts, Promotion, read_facts, remove_promotion, write_promotion
from sortd.errors import ModelError
from sortd.events import DatasetId, Embedded, Mode, Move, PrototypesBuilt, RebuildFailed, Stamp
from sortd.layout import Area, Layout
from sortd.store.cache import Cache
from sortd.watch.scan import stamp
from tests.command_line import write_config
from tests.daemon_process import COLOURS, PATIENCE_SECONDS, make_dataset, picture
from tests.fake_encoder import FakeEncoder
from tests.finetuned_folder import write_folder
from tests.prototype_maker import make_prototypes


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two datasets of the same three colours, and a site without decoding processes to wait for."""
    for name in ("First", "Second"):
        make_dataset(tmp_path / "Data", name)
    file = write_config(tmp_path, abstain="off", mode="max", decoding="{workers: 1}")
    return read_config(file, {"HOME": str(tmp_path)})


class CountingEncoder:
    """The encoder of the tests, which counts the images that it was given."""

    def __init__(self) -> None:
        """Begin with none."""
        self._fake = FakeEncoder()
        self.encoder_id, self.dimensions = self._fake.encoder_id, self._fake.dimensions
        self.preprocessing, self.has_text = self._fake.preprocessing, self._fake.has_text
        self.images = 0

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """Embed, and count."""
        self.images += len(pixels)
        return self._fake.encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed."""
        return self._fake.encode_texts(texts)


class Bench:
    """A worker at work on a site, asked and listened to as the loop does."""

    def __init__(self, config: Config) -> None:
        """Start it."""
        self.config = config
        self.encoder = CountingEncoder()
        self.site = Resources(config, load_encoder=lambda _: self.encoder)
        self.inbox: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self.worker = Worker(self.site, self.inbox.put)
        self.worker.start()

    def layout(self, dataset: str) -> Layout:
        """Return a dataset's folders."""
        return Layout(self.config.root / dataset)

    def promote(self, dataset: str, facts: FinetunedFacts) -> None:
        """Write a promotion down."""
        folder = self.layout(dataset).state_folder(self.config.state_dir)
        write_promotion(folder, Promotion(facts.folder, facts.model_id, facts.verdict, 0.0))

    def demote(self, dataset: str) -> None:
        """Take a promotion back."""
        assert remove_promotion(self.layout(dataset).state_folder(self.config.state_dir))

    def job(self, dataset: str) -> RebuildJob:
        """Return a rebuild of a dataset."""
        clases = self.layout(dataset).area(Area.CLASES)
        return RebuildJob(DatasetId(dataset), clases, reference_settings_of(self.config.dataset(dataset)), 0, 1)

    def rebuild(self, dataset: str) -> tuple[PrototypesBuilt, Answer]:
        """Ask for a rebuild and return what was built, and the whole answer."""
        self.worker.ask(self.job(dataset))
        answer = self.answer()
        (built,) = (event for event in answer.events if isinstance(event, PrototypesBuilt))
        return built, answer

    def ask(self, dataset: str, colour: str, numbers: range) -> None:
        """Ask for the rows of new images."""
        self.worker.ask(EmbedJob(DatasetId(dataset), self.draw(dataset, colour, numbers)))

    def draw(self, dataset: str, colour: str, numbers: range) -> tuple[tuple[str, Stamp], ...]:
        """Put images into the inbox and return them with their stamps."""
        images = []
        for number in numbers:
            path = self.layout(dataset).area(Area.IMAGES) / f"{colour}-{number}.png"
            picture(colour, number).save(path)
            mark = stamp(str(path))
            assert mark is not None
            images.append((str(path), mark))
        return tuple(images)

    def rows(self, dataset: str, count: int) -> set[str]:
        """Wait for the rows of so many images of a dataset and return the encoders that made them."""
        encoders: set[str] = set()
        while count > 0:
            answer = self.answer()
            assert answer.dataset == DatasetId(dataset)
            for event in answer.events:
                assert isinstance(event, Embedded), event
                encoders.add(event.encoder_id)
                count -= len(event.images)
        return encoders

    def answer(self) -> Answer:
        """Wait for the next answer."""
        while True:
            message = self.inbox.get(timeout=PATIENCE_SECONDS)
            assert not isinstance(message, WorkerDied), message
            if isinstance(message, Answer):
                return message


@contextmanager
def at_work(config: Config) -> Iterator[Bench]:
    """Start a worker and end it."""
    bench = Bench(config)
    try:
        yield bench
    finally:
        assert bench.worker.stop(PATIENCE_SECONDS)


def test_worker_dataset_on_a_finetuned_model_needs_no_other_forward(config: Config, vit: FinetunedFacts) -> None:
    """Its images go through the model alone, those of the other dataset through the configured encoder alone."""
    with at_work(config) as bench:
        bench.promote("First", vit)
        first, _ = bench.rebuild("First")
        second, _ = bench.rebuild("Second")
        assert first.finetuned is not None
        assert (first.finetuned.encoder_id, second.finetuned) == (vit.model_id, None)
        assert first.prototypes.encoder_id == bench.encoder.encoder_id
        references = bench.encoder.images
        bench.ask("First", "red", range(5))
        assert bench.rows("First", 5) == {vit.model_id}
        assert bench.encoder.images == references
        bench.ask("Second", "red", range(100, 103))
        assert bench.rows("Second", 3) == {bench.encoder.encoder_id}
        assert bench.encoder.images == references + 3


def test_neither_encoder_keeps_the_other_waiting(config: Config, vit: FinetunedFacts) -> None:
    """A few images of one dataset are answered while hundreds of the other, asked before, are still on their way."""
    many, few = 300, 3
    with at_work(config.model_copy(update={"batch_size": 4})) as bench:
        bench.promote("Second", vit)
        bench.rebuild("First")
        bench.rebuild("Second")
        bench.ask("First", "red", range(many))
        bench.ask("Second", "green", range(few))
        answered = {"First": 0, "Second": 0}
        while answered["Second"] < few:
            answer = bench.answer()
            answered[answer.dataset.name] += sum(len(one.images) for one in answer.events if isinstance(one, Embedded))
        assert answered["First"] < many


def test_worker_change_of_the_classifier_is_a_new_generation_and_a_restart_is_none(
    config: Config, vit: FinetunedFacts
) -> None:
    """So that Review/ is decided again once, when somebody else decides, and not at every start."""
    with at_work(config) as bench:
        before, _ = bench.rebuild("First")
        bench.promote("First", vit)
        promoted, _ = bench.rebuild("First")
        assert promoted.finetuned is not None
        assert promoted.finetuned.generation == promoted.prototypes.generation == before.prototypes.generation + 1
    with at_work(config) as bench:
        again, answer = bench.rebuild("First")
        assert again.finetuned is not None
        assert again.finetuned.generation == promoted.finetuned.generation
        assert answer.rebuilt is not None
        assert not answer.rebuilt.changed
        bench.demote("First")
        demoted, _ = bench.rebuild("First")
        assert demoted.finetuned is None
        assert demoted.prototypes.generation == promoted.finetuned.generation + 1


def test_worker_ruined_references_are_kept_out_and_the_model_that_does_not_fit_them_too(
    config: Config, vit: FinetunedFacts
) -> None:
    """The reload gate keeps the old prototypes; they take over from the model, as another generation."""
    clases, colours = config.root / "First" / "Clases", tuple(COLOURS)
    for index, colour in enumerate(colours):
        for number in range(12):
            right = picture(colour, 1000 + 100 * index + number, patches=40)
            right.save(clases / colour / f"more{number}.png")
    with at_work(config.model_copy(update={"mode": "best"})) as bench:
        bench.promote("First", vit)
        before, _ = bench.rebuild("First")
        (clases / "mauve").mkdir()
        for index, colour in enumerate(colours):
            for number in range(16):
                wrong = picture(colours[index - 1], 5000 + 100 * index + number, patches=40)
                wrong.save(clases / colour / f"wrong{number}.png")
        kept, answer = bench.rebuild("First")
        assert any(isinstance(event, RebuildFailed) and event.is_lasting for event in answer.events)
        assert "'mauve'" in str(answer.refusal)
        assert kept.finetuned is None
        assert kept.prototypes.labels == before.prototypes.labels
        assert kept.prototypes.generation > before.prototypes.generation
        bench.ask("First", "red", range(2))
        assert bench.rows("First", 2) == {bench.encoder.encoder_id}


def test_resources_model_serves_two_datasets_and_is_unloaded_with_the_last(config: Config, vit: FinetunedFacts) -> None:
    """It is in memory once."""
    with at_work(config) as bench:
        for name in ("First", "Second"):
            bench.promote(name, vit)
            bench.rebuild(name)
        (embedder,) = bench.site.finetuned.values()
        assert embedder.encoder.encoder_id == vit.model_id
        bench.demote("First")
        bench.rebuild("First")
        assert list(bench.site.finetuned.values()) == [embedder]
        bench.demote("Second")
        bench.rebuild("Second")
        assert not bench.site.finetuned


def test_worker_dataset_that_comes_back_at_once_is_served(config: Config, vit: FinetunedFacts) -> None:
    """What is asked for the new one of that name is not dropped with the old one, whose model is let go."""
    with at_work(config) as bench:
        bench.promote("First", vit)
        bench.rebuild("First")
        bench.demote("First")
        many = bench.draw("First", "red", range(200))
        bench.worker.ask(bench.job("Second"))  # while it is carried out, the two that follow are taken in
        bench.worker.ask(Forget(DatasetId("First")))
        bench.worker.ask(EmbedJob(DatasetId("First", 2), many))
        left = len(many)
        while left:
            left -= sum(len(one.images) for one in bench.answer().events if isinstance(one, Embedded))
        bench.rebuild("First")
        assert not bench.site.finetuned


def test_resources_model_that_loads_and_cannot_answer_is_refused(
    config: Config, vit: FinetunedFacts, tmp_path: Path
) -> None:
    """Facts that do not agree with the network: what transformers raises becomes a sentence, and prototypes serve."""
    folder = tmp_path / "at another size"
    shutil.copytree(vit.folder, folder)
    file = folder / FACTS_FILE
    said = json.loads(file.read_text("utf-8"))
    said["preprocessing"] |= {"shortest_edge": 48, "crop_height": 48, "crop_width": 48}
    file.write_text(json.dumps(said), "utf-8")
    with at_work(config) as bench:
        bench.promote("First", read_facts(folder))
        built, answer = bench.rebuild("First")
    assert built.finetuned is None
    assert f"the fine-tuned model in {folder} cannot be used (" in str(answer.refusal)


def test_simulate_decides_by_the_finetuned_model_too(config: Config, vit: FinetunedFacts) -> None:
    """What `once --dry-run` foretells is what `once` would do."""
    layout = Layout(config.root / "First")
    write_promotion(layout.state_folder(config.state_dir), Promotion(vit.folder, vit.model_id, vit.verdict, 0.0))
    for name in ("First", "Second"):
        picture("green", 1).save(config.root / name / "Images" / "a.png")
    told: dict[str, tuple[str, str]] = {}

    def tell(dataset: str, move: Move, _: str) -> None:
        assert move.decision is not None
        told[dataset] = (move.folder, move.decision.mode.value)

    simulate(config, tell, load_encoder=lambda _: FakeEncoder())
    assert told == {"First": ("Dataset/green", "finetuned"), "Second": ("Dataset/green", "max")}


class TestSelectClassifier:
    """What is to decide, told from what is written down; no model is loaded."""

    @pytest.fixture
    def layout(self, config: Config) -> Layout:
        """A dataset."""
        return Layout(config.root / "First")

    def test_select_without_a_promotion_the_prototypes_decide(self, config: Config, layout: Layout) -> None:
        """Silently, unless a fine-tuned model is asked for by name."""
        assert select_classifier(layout, config.state_dir, "auto", tuple(COLOURS)).refusal is None
        refusal = select_classifier(layout, config.state_dir, "finetuned", tuple(COLOURS)).refusal
        assert "no model is promoted: `sortd finetune --dataset First`" in str(refusal)

    def test_select_configured_prototypes_are_kept(self, config: Config, layout: Layout, tmp_path: Path) -> None:
        """`classifier: prototypes` looks at no promotion; auto and finetuned take it."""
        facts = write_folder(tmp_path / "model")
        promotion = Promotion(facts.folder, facts.model_id, facts.verdict, 0.0)
        write_promotion(layout.state_folder(config.state_dir), promotion)
        found = {
            wanted: select_classifier(layout, config.state_dir, wanted, tuple(COLOURS)).model_id
            for wanted in ("auto", "prototypes", "finetuned")
        }
        assert found == {"auto": facts.model_id, "prototypes": "", "finetuned": facts.model_id}

    def test_select_another_model_under_the_promoted_name_is_refused(
        self, config: Config, layout: Layout, tmp_path: Path
    ) -> None:
        """What was compared and promoted is what decides, nothing that was put in its place."""
        facts = write_folder(tmp_path / "model")
        promotion = Promotion(facts.folder, facts.model_id, facts.verdict, 0.0)
        folder = layout.state_folder(config.state_dir)
        write_promotion(folder, replace(promotion, model_id="finetuned-3-torch-another"))
        refusal = select_classifier(layout, config.state_dir, "auto", tuple(COLOURS)).refusal
        assert "another model than the promoted one" in str(refusal)

    def test_select_damaged_promotion_is_refused(self, config: Config, layout: Layout) -> None:
        """The sentence names the file and how to mend it."""
        folder = layout.state_folder(config.state_dir)
        folder.mkdir(parents=True)
        (folder / "classifier.json").write_text('{"folder": ')
        refusal = str(select_classifier(layout, config.state_dir, "auto", tuple(COLOURS)).refusal)
        assert "classifier.json is damaged" in refusal
        assert "sortd models demote" in refusal


def store(cache: Cache, root: Path) -> PrototypeStore:
    """Return where the prototypes of the datasets below a root are kept."""
    return Resources(Config(root=root, state_dir=root / "state", cache_dir=root / "cache"))._store(cache)


def test_resources_roots_that_share_a_cache_have_prototypes_of_their_own(tmp_path: Path) -> None:
    """Datasets of one name in two places are two datasets: neither decides with what the other one has learnt."""
    here, there = tmp_path / "here", tmp_path / "there"
    prototypes = make_prototypes(make_dataset(here), DecisionSettings(Mode.MAX, None))
    make_dataset(there)
    with Cache(tmp_path / "cache" / "embeddings.sqlite") as cache:
        store(cache, here).write("Colours", prototypes)
        assert store(cache, there).read("Colours") is None
        found = store(cache, here).read("Colours")
    assert found is not None
    assert found.fingerprint == prototypes.fingerprint


def child_processes() -> set[int]:
    """Return the children of this process; the command line of one that has just been started may be empty yet."""
    children = Path("/proc/self/task").glob("*/children")
    return {int(number) for path in children for number in path.read_text(encoding="ascii").split()}


def test_load_starts_the_decoding_processes_before_the_model(config: Config) -> None:
    """The pool gets the processes that started while the model was loaded."""
    before, during = child_processes(), set[int]()

    def load_encoder(_: Config) -> FakeEncoder:
        during.update(child_processes() - before)
        return FakeEncoder()

    resources = Resources(config, load_encoder=load_encoder)
    try:
        resources.load()
        assert len(during) == 1
        assert child_processes() - before == during
    finally:
        resources.unload()
    assert child_processes() == before


def test_load_of_a_model_that_fails_leaves_no_process_or_file(config: Config) -> None:
    """``unload`` ends the processes that no pool has."""
    before = child_processes(), len(os.listdir("/proc/self/fd"))

    def load_encoder(_: Config) -> FakeEncoder:
        raise ModelError("no such model")

    resources = Resources(config, load_encoder=load_encoder)
    with pytest.raises(ModelError):
        resources.load()
    resources.unload()
    resources.unload()
    assert (child_processes(), len(os.listdir("/proc/self/fd"))) == before
