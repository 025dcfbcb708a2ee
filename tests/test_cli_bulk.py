"""The commands of ``sortd bulk`` with the packaged model, and the options that they refuse."""

import json
from pathlib import Path

import pytest

import sortd
from sortd import bulk
from sortd.bulk.engines import _PartActor, _result_of
from sortd.errors import DataError, ModelError
from tests.bulk.bulk_run import decisions_of, draw_images, load_fake, save_classifier, settings_for
from tests.command_line import sortd as run_sortd
from tests.command_line import write_config
from tests.daemon_process import make_dataset


def test_decide_in_shards_uses_the_configured_model(tmp_path: Path) -> None:
    """Plan, decide twice and report, by the command line; the second shard resumes nothing of the first."""
    dataset = make_dataset(tmp_path / "Data")
    draw_images(tmp_path / "photos", 6)
    config = write_config(tmp_path, device="cpu")
    with sortd.load_encoder("packaged", device="cpu") as encoder:
        sortd.Classifier.from_folder(dataset / "Clases", encoder=encoder).save(tmp_path / "classifier")
        encoder_id = encoder.id
    assert run_sortd("bulk", "plan", tmp_path / "photos", "--out", tmp_path / "run").code == 0
    options = ("--classifier", tmp_path / "classifier", "--config", config, "--json")
    facts = run_sortd("bulk", "decide", tmp_path / "run", "--shard", "1/1", *options).facts
    assert (facts["images"], facts["parts"], facts["parts_before"], facts["unreadable"]) == (6, 1, 0, 0)
    assert facts["stages"].keys() == {"read", "decode", "encode", "decide", "write"}
    assert set(decisions_of(tmp_path / "run")["encoder_id"].to_pylist()) == {encoder_id}
    again = run_sortd("bulk", "decide", tmp_path / "run", "--shard", "1/1", *options).facts
    assert (again["images"], again["parts"], again["parts_before"]) == (0, 0, 1)
    assert run_sortd("bulk", "report", tmp_path / "run", "--json").facts["decided"] == 6


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "one/two"])
def test_shard_that_is_none_is_refused(tmp_path: Path, shard: str) -> None:
    """The form is shown."""
    ran = run_sortd("bulk", "decide", tmp_path, "--classifier", tmp_path, f"--shard={shard}")
    assert ran.code == 2
    assert "I/N" in ran.err


@pytest.mark.parametrize("option", [("--actors", "2"), ("--num-gpus", "1"), ("--address", "auto")])
def test_option_of_ray_with_a_shard_is_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    """A shard starts no actors."""
    ran = run_sortd("bulk", "decide", tmp_path, "--classifier", tmp_path, "--shard", "1/2", *option)
    assert ran.code == 2


def test_run_or_classifier_that_is_absent_is_refused(tmp_path: Path) -> None:
    """With the exit code of bad data, before any model is loaded."""
    options = ("--classifier", tmp_path / "none", "--shard", "1/1")
    assert "no complete plan" in run_sortd("bulk", "decide", tmp_path / "none", *options).err
    draw_images(tmp_path / "photos", 1)
    run_sortd("bulk", "plan", tmp_path / "photos", "--out", tmp_path / "run")
    ran = run_sortd("bulk", "decide", tmp_path / "run", *options)
    assert ran.code == 65
    assert "has no classifier" in ran.err


def test_error_of_an_actor_is_that_of_the_command(tmp_path: Path) -> None:
    """It comes back as a result, since Ray would try again, and print a traceback."""
    classifier = save_classifier(tmp_path)
    actor = _PartActor(tmp_path / "none", settings_for(classifier), load_fake)
    (text,) = actor({"part": [0]})["result"]
    with pytest.raises(DataError, match="plan the run again"):
        _result_of(text)
    assert _result_of("null") is None
    assert _result_of(json.dumps({"images": 3})) == {"images": 3}
    assert actor._decider is not None
    actor._decider.__exit__()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray a shard is still possible, and the message says so."""
    monkeypatch.setattr(bulk, "find_spec", lambda name: None if name == "ray" else name)
    bulk.require_bulk_packages()
    with pytest.raises(ModelError, match=r"ray: pip install .*--shard 1/1"):
        bulk.require_bulk_packages(with_ray=True)
