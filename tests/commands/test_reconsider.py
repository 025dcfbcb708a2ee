"""Filed images decided again: proposed, moved on request with and without a daemon, and taken back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sortd.commands.reconsider import apply_proposals, reconsider_datasets
from sortd.config import Config, read_config
from sortd.daemon.control import AnsweredError, ask
from sortd.encoder.finetuned import FinetunedFacts
from tests.command_line import Ran, sortd, write_config
from tests.commands.test_groups import no_model, yellow
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, teach, tree
from tests.fake_encoder import FakeEncoder
from tests.filed_images import file_images

YELLOWS = [f"yellow{number}.png" for number in range(4)]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset that has a class yellow since some yellow images, one with a sidecar, and red ones were filed."""
    config = write_config(tmp_path, mode="best", abstain="off", settle_seconds=0.1)
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset)
    for number, name in enumerate(YELLOWS):
        yellow(number).save(dataset / "Images" / name)
        picture("red", 3000 + number, patches=40).save(dataset / "Images" / f"red{number}.png")
    (dataset / "Images" / "yellow2.xmp").write_text("<x:xmpmeta/>")
    file_all(config)
    folder = dataset / "Clases" / "yellow"
    folder.mkdir()
    for number in range(24):
        yellow(500 + number).save(folder / f"{number}.png")
    file_all(config)
    return dataset


def file_all(config: Path) -> None:
    """File what is in Images/ by the present references."""
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0


def config_of(site: Path) -> Config:
    """Return the configuration of a site."""
    return read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"})


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", site.parents[1] / "config.yaml")


def listed(site: Path, *arguments: object) -> Mapping[str, Any]:
    """Return what the command prints of the dataset."""
    facts: Mapping[str, Any] = run(site, "reconsider", "--json", *arguments).facts["datasets"]["Colours"]
    return facts


def place_of(site: Path, name: str) -> Path:
    """Return where an image was filed."""
    (path,) = (site / "Dataset").rglob(name)
    return path


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(os.listdir(folder))


class TestProposals:
    """What ``sortd reconsider`` prints."""

    def test_reconsider_proposes_other_classes_and_moves_nothing(self, site: Path) -> None:
        """Each proposal has both classes and both probabilities; no model is loaded."""
        before = tree(site)
        facts = listed(site)
        assert (facts["considered"], facts["abstained"], facts["unreadable"]) == (8, 0, [])
        assert {(Path(one["path"]).name, one["to"]) for one in facts["proposals"]} == {(n, "yellow") for n in YELLOWS}
        for one in facts["proposals"]:
            assert Path(one["path"]).parent.name == one["from"] != "yellow"
            assert 0 < one["then"] <= 1
            assert 0.5 < one["now"] <= 1
        assert [len(one.proposals) for one in reconsider_datasets(config_of(site), load_encoder=no_model)] == [4]
        ran = run(site, "reconsider", "Colours", "--dry-run")
        assert all(name in ran.out for name in YELLOWS)
        assert "sortd reconsider --apply" in ran.err
        assert tree(site) == before
        assert run(site, "reconsider", "--apply", "--dry-run").code == 2
        assert run(site, "reconsider", "Other").code == 65

    def test_reconsider_images_without_an_embedding_or_prototypes_are_embedded(self, site: Path) -> None:
        """The cache may be lost."""
        for file in sorted((site.parents[1] / "cache").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (found,) = reconsider_datasets(config_of(site), load_encoder=lambda _: FakeEncoder())
        assert {Path(one.file[0]).name for one in found.proposals} == set(YELLOWS)

    def test_reconsider_images_of_which_a_person_said_something_are_left_out(self, site: Path) -> None:
        """Corrected and changed images, those put there by hand, and references."""
        corrected, changed, known = (place_of(site, name) for name in YELLOWS[:3])
        (site / "Dataset" / "blue").mkdir(exist_ok=True)
        corrected.rename(site / "Dataset" / "blue" / corrected.name)
        yellow(77).save(changed)
        yellow(78).save(known.parent / "by hand.png")
        file_all(site.parents[1] / "config.yaml")
        assert {Path(one["path"]).name for one in listed(site)["proposals"]} == {"yellow2.png", "yellow3.png"}

    def test_reconsider_counts_images_that_would_go_to_review(self, site: Path, tmp_path: Path) -> None:
        """Abstentions are no proposals, and where abstaining is on a class is proposed only above the threshold."""
        (site / "Clases" / "yellow").rename(tmp_path / "away")
        write_config(tmp_path, mode="best", abstain="{precision: 0.95}")
        before = tree(site)
        (found,) = reconsider_datasets(config_of(site), load_encoder=lambda _: FakeEncoder())
        assert (found.considered, found.abstained >= 4, found.proposals) == (8, True, ())
        file_all(site.parents[1] / "config.yaml")
        assert f"{found.abstained} of 8 would go to Review today; they stay" in run(site, "reconsider").out
        assert tree(site) == before

    def test_reconsider_dataset_without_filed_images_needs_no_model(self, tmp_path: Path) -> None:
        """Nothing is considered, and nothing can be applied."""
        write_config(tmp_path)
        make_dataset(tmp_path / "Data")
        (found,) = reconsider_datasets(config_of(tmp_path / "Data" / "Colours"), load_encoder=no_model)
        assert found.facts()["considered"] == 0
        assert apply_proposals(config_of(tmp_path / "Data" / "Colours"), found) == {"refiled": [], "later": 0}

    def test_reconsider_with_a_fine_tuned_model_decides_by_it(
        self, tmp_path: Path, vit: FinetunedFacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its logits are read from the cache, or the images are encoded; the journal has what decided."""
        config = write_config(tmp_path, abstain="off", device="cpu")
        dataset = make_dataset(tmp_path / "Data")
        monkeypatch.setattr("tests.filed_images.picture", lambda _, seed: picture("blue", seed))
        file_images(dataset, tmp_path / "state", {"a.png": "red", "b.png": "green", "c.png": "blue"})
        assert sortd("models", "promote", vit.folder, "-c", config).code == 0
        (found,) = reconsider_datasets(config_of(dataset), load_encoder=lambda _: FakeEncoder())
        again = [one.facts() for one in reconsider_datasets(config_of(dataset), load_encoder=lambda _: FakeEncoder())]
        assert again == [found.facts()]
        assert [(one["to"], one["mode"]) for one in found.facts()["proposals"]] == [("blue", "finetuned")] * 2
        assert len(apply_proposals(config_of(dataset), found)["refiled"]) == 2
        assert names_in(dataset / "Dataset" / "blue") == ["a.png", "b.png", "c.png"]
        rows = run(dataset, "history", "--json", "--outcome", "refiled").facts["moves"]
        assert {(row["mode"], row["encoder_id"]) for row in rows} == {("finetuned", vit.model_id)}


class TestApply:
    """What ``--apply`` moves where no sortd runs."""

    def test_apply_moves_images_with_companions_and_overwrites_nothing(self, site: Path) -> None:
        """The journal has the decision, the accuracy counts each image in its new class, and nothing is left to do."""
        (site / "Dataset" / "yellow").mkdir()
        (site / "Dataset" / "yellow" / "yellow0.png").write_bytes(b"somebody else's")
        ran = run(site, "reconsider", "--apply", "--json")
        assert ran.code == 0
        assert len(ran.facts["datasets"]["Colours"]["refiled"]) == 4
        assert names_in(site / "Dataset" / "yellow") == sorted([*YELLOWS, "yellow0 (2).png", "yellow2.xmp"])
        assert (site / "Dataset" / "yellow" / "yellow0.png").read_bytes() == b"somebody else's"
        rows = run(site, "history", "--json", "--outcome", "refiled").facts["moves"]
        assert {row["label"] for row in rows} == {"yellow"}
        assert all(row["score"] > 0.5 and row["content"] and row["encoder_id"] == "fake-48" for row in rows)
        accuracy = run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]
        assert {label: one["filed"] for label, one in accuracy.items()} == {"red": 4, "yellow": 4}
        assert listed(site)["proposals"] == []

    def test_apply_undone_restores_everything_and_is_not_proposed_again(self, site: Path) -> None:
        """Images in a class are not held: nothing would move them."""
        before = tree(site)
        run(site, "reconsider", "--apply")
        assert tree(site) != before
        undone = run(site, "undo", "--last", 4)
        assert (undone.code, "held" in undone.err) == (0, False)
        assert tree(site) == before
        assert run(site, "status", "--json").facts["datasets"]["Colours"]["held"] == 0
        assert (listed(site)["considered"], listed(site)["proposals"]) == (4, [])

    def test_apply_image_changed_or_moved_since_stays(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each image has a result of its own, and the others are moved, whatever requests they are in."""
        monkeypatch.setattr("sortd.commands.reconsider.MOST_IN_A_REQUEST", 1)
        (found,) = reconsider_datasets(config_of(site), load_encoder=no_model)
        changed, moved = place_of(site, YELLOWS[0]), place_of(site, YELLOWS[1])
        yellow(66).save(changed)
        moved.rename(moved.with_name("elsewhere.png"))
        results = apply_proposals(config_of(site), found)["refiled"]
        said = {Path(one["path"]).name: one["message"] for one in results if one["destination"] is None}
        assert "changed or replaced" in said[YELLOWS[0]]
        assert "gone" in said[YELLOWS[1]]
        assert names_in(site / "Dataset" / "yellow") == sorted([*YELLOWS[2:], "yellow2.xmp"])


class TestApplyByDaemon:
    """What ``--apply`` asks a running sortd."""

    def test_apply_by_a_running_sortd_is_logged_and_can_be_undone(self, site: Path) -> None:
        """The images are taken for no correction, and a release after the undo moves nothing."""
        before = tree(site / "Dataset")
        with running(site.parents[1] / "config.yaml") as daemon:
            ran = run(site, "reconsider", "--apply", "--json")
            assert (ran.code, len(ran.facts["datasets"]["Colours"]["refiled"])) == (0, 4)
            line = daemon.wait_for("image.refiled", count=4)
            assert (line["label"], line["mode"]) == ("yellow", "best")
            assert names_in(site / "Dataset" / "yellow") == sorted([*YELLOWS, "yellow2.xmp"])
            assert run(site, "undo", "--last", 4).code == 0
            daemon.wait_for("move.undone", count=4)
            assert tree(site / "Dataset") == before
            assert run(site, "release", "--all").code == 0
            picture("red", 1).save(site / "Images" / "last.png")
            daemon.wait_for("image.filed")
            assert daemon.events("image.corrected") == []
        (site / "Dataset" / "red" / "last.png").unlink()
        assert tree(site / "Dataset") == before

    def test_refile_request_for_anything_but_a_filed_image_is_refused(self, site: Path) -> None:
        """Paths, classes and versions of a request are checked where they are used."""
        state = site.parents[1] / "state"
        (found,) = reconsider_datasets(config_of(site), load_encoder=no_model)
        good, *_ = found.images
        reference = site / "Clases" / "red" / "0.png"
        request = {"do": "refile", "dataset": "Colours", "root": str(site)}
        with running(site.parents[1] / "config.yaml"):
            before = tree(site)
            for change, message in (
                ({"path": str(reference)}, "not an image in Dataset/"),
                ({"path": f"{site}/Dataset/../Clases/red/0.png"}, "not an image in Dataset/"),
                ({"label": "../Images"}, "no class"),
                ({"label": "mauve"}, "no class"),
                ({"label": Path(str(good["path"])).parent.name}, "in this class already"),
                ({"mtime_ns": 1}, "changed or replaced"),
            ):
                (refused,) = (ask(state, request | {"images": [good | change]}) or {})["refiled"]
                assert refused["destination"] is None
                assert message in refused["message"]
            for change in (
                {"mode": "guess"},
                {"content": "\ud800"},
                {"encoder_id": "\ud800"},
                {"second_label": "\ud800"},
                {"generation": 1 << 63},
            ):
                with pytest.raises(AnsweredError, match="not a valid request"):  # the dataset goes on
                    ask(state, request | {"images": [good | change]})
            assert tree(site) == before
