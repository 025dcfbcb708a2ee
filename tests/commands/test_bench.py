"""``sortd bench``: figures of the user's own machine and images, and not one file of theirs moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sortd.commands import bench
from sortd.commands.bench import backend_advice, draw, measure, print_measured
from sortd.config import Config, read_config
from sortd.errors import DataError, ModelError
from tests.command_line import sortd
from tests.daemon_process import picture, tree
from tests.fake_encoder import FakeEncoder

Write = Callable[..., Path]
Facts = dict[str, Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STAGE_SECONDS", 0.0)


def _never(_: Config, backend: str) -> FakeEncoder:
    raise ModelError(f"{backend} is not here")


def test_measure_packaged_model_changes_no_file(colours: Path, write_config: Write) -> None:
    """Every stage has a time, the bound follows from the stages, and the tree is unchanged."""
    config = write_config(model="packaged")
    before = tree(colours)
    ran = sortd("bench", "--config", config, "--images", 6, "--json", environment={"OMP_NUM_THREADS": "1"})
    assert ran.code == 0
    facts = ran.facts
    assert tree(colours) == before
    assert facts["files"] == 6
    stages = facts["stages"]
    assert all(stages[name] > 0 for name in ("decode", "encode", "encode_alone", "move"))
    bound = 1e3 / (stages["encode"] + stages["decode"] / facts["cores"])
    if facts["device"] == "cpu":
        assert facts["bound_per_second"] == pytest.approx(bound)
    assert [one["backend"] for one in facts["backends"] if one["serves"]] == ["torch"]
    assert facts["advice"]


def test_print_measured_shows_all_stages(
    colours: Path, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """The speed comes first, then the stages, the backends and the recommendations."""
    del colours
    config = read_config(write_config(), {})
    print_measured(measure(config, None, images=4, load_encoder=lambda _: FakeEncoder(), load_other=_never))
    said = capsys.readouterr().out
    assert "images/s" in said.splitlines()[0]
    assert [line.split("\t")[0] for line in said.splitlines() if line.count("\t") == 2][1:] == [
        *("decode", "encode", "encode alone", "move")
    ]
    assert "bottleneck" in said


def test_draw_uses_the_given_folder(tmp_path: Path, write_config: Write) -> None:
    """A folder needs no dataset; one without images is an error."""
    config = read_config(write_config(), {})
    (tmp_path / "album").mkdir()
    with pytest.raises(DataError, match=r"there is no image in .*album"):
        draw(config, tmp_path / "album", 10)
    for number in range(4):
        picture("red", number).save(tmp_path / "album" / f"{number}.png")
    (tmp_path / "album" / "notes.txt").write_text("no image")
    measured = measure(config, tmp_path / "album", images=10, load_encoder=lambda _: FakeEncoder(), load_other=_never)
    assert measured["files"] == 4
    assert len(list((tmp_path / "album").iterdir())) == 5
    assert list(tmp_path.rglob(".sortd-bench-*")) == []


def advised(
    *backends: Facts, limit: str = "forward", device: str = "cpu", refusal: str | None = None, hint: str | None = None
) -> list[str]:
    """Return the advice for these backends."""
    facts = {"backends": backends, "limit": limit, "device": device, "int8_refusal": refusal, "onnx_hint": hint}
    return [*backend_advice(facts)]


def backend(name: str, images_per_second: float, *, serves: bool = False) -> Facts:
    """Return what was measured of one backend."""
    return {"backend": name, "images_per_second": images_per_second, "serves": serves}


TORCH = backend("torch", 14.0, serves=True)
INT8 = backend("onnx-int8", 22.0)
FP32 = backend("onnx", 18.0)


def test_backend_advice_recommends_the_fastest() -> None:
    """A backend is recommended if it is clearly faster; a bottleneck in decoding is reported."""
    first, second = advised(INT8, TORCH)
    assert first == "set `backend: onnx`: onnx-int8 is 1.6 times as fast"
    assert second.startswith("the bottleneck is the model")
    as_fast = backend("onnx", 14.3)
    assert advised(as_fast, TORCH)[0] == "keep the backend: no other usable one is faster than torch"
    assert advised(TORCH, limit="decode")[-1].startswith("the bottleneck is decoding")


def test_backend_advice_skips_refused_and_active_backends() -> None:
    """Neither a refused int8 nor the active backend is recommended."""
    first, second, _ = advised(INT8, FP32, TORCH, refusal="12 references are too few")
    assert first == "set `backend: onnx`: onnx is 1.3 times as fast"
    assert second == "onnx-int8 is 1.6 times as fast, but is not used: 12 references are too few"
    serving = FP32 | {"serves": True}
    first, second, _ = advised(INT8, serving, TORCH | {"serves": False}, refusal="not judged yet")
    assert first.endswith("is faster than onnx")
    assert "1.2 times as fast, but is not used: not judged yet" in second
    first, _ = advised(INT8, serving)
    assert first.startswith("restart sortd: onnx-int8 is usable now")


def test_backend_advice_with_only_torch_names_the_missing_steps() -> None:
    """With a GPU for torch there is no hint."""
    hint = "`sortd models export`"
    assert hint in advised(TORCH, hint=hint)[1]
    assert not any(hint in sentence for sentence in advised(TORCH, hint=hint, device="cuda"))
