"""Pickled weights become safetensors once, in a process that runs no code and opens no socket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sortd.encoder.models import verify_clip, weight_files
from sortd.encoder.pickles import convert_folder
from sortd.errors import ModelError
from tests.command_line import write_config
from tests.daemon_process import PATIENCE_SECONDS
from tests.encoder.test_models import write_model


class _Opener:
    """What a hostile pickle holds: whoever loads it without care makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        """Open the file for writing."""
        return open, (self.path, "w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose weights are one pickle, two of its tensors in the same memory."""
    made = write_model(tmp_path / "clip", weights="")
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared.T, "c": shared[0]}, made / "0_CLIPModel" / "pytorch_model.bin")
    return made


class TestConvert:
    """``convert_folder`` writes beside the pickle and removes nothing."""

    def test_convert_writes_equal_tensors(self, folder: Path) -> None:
        """The folder can be used from then on; a second call finds nothing to do."""
        module = folder / "0_CLIPModel"
        assert convert_folder("mine", folder) == [module / "model.safetensors"]
        written, pickled = load_file(module / "model.safetensors"), torch.load(module / "pytorch_model.bin")
        assert written.keys() == pickled.keys()
        assert all(torch.equal(written[key], pickled[key]) for key in pickled)
        assert verify_clip("mine", folder).kind == "clip"
        assert convert_folder("mine", folder) == []
        assert {path.name for path in module.iterdir()} == {"config.json", "model.safetensors", "pytorch_model.bin"}

    def test_convert_sharded_pickles_writes_an_index(self, tmp_path: Path) -> None:
        """As transformers reads them."""
        module = write_model(tmp_path / "clip", weights="") / "0_CLIPModel"
        for number, key in enumerate("ab", 1):
            torch.save({key: torch.ones(number)}, module / f"pytorch_model-0000{number}-of-00002.bin")
        assert len(convert_folder("mine", tmp_path / "clip")) == 2
        files = weight_files("mine", module)
        assert [file.name for file in files] == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        assert [set(load_file(file)) for file in files] == [{"a"}, {"b"}]

    @pytest.mark.parametrize("content", ["code", "number", "list", "garbage"])
    def test_convert_refuses_all_but_tensors(self, folder: Path, tmp_path: Path, content: str) -> None:
        """Nothing runs, and nothing is left behind."""
        module = folder / "0_CLIPModel"
        pickle = module / "pytorch_model.bin"
        held = {"code": {"a": _Opener(str(tmp_path / "owned"))}, "number": {"a": 1}, "list": [torch.ones(2)]}
        if content == "garbage":
            pickle.write_bytes(os.urandom(500))
        else:
            torch.save(held[content], pickle)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin holds something other than weights, and was not run"):
            convert_folder("mine", folder)
        assert not (tmp_path / "owned").exists()
        assert {path.name for path in module.iterdir()} == {"config.json", "pytorch_model.bin"}

    def test_convert_process_opens_no_socket(self) -> None:
        """The kernel refuses; local sockets, too."""
        program = (
            "import socket\nfrom sortd.encoder.pickles import _forbid_network\n_forbid_network()\n"
            "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):\n"
            "    try: socket.socket(family)\n"
            "    except PermissionError: print('refused')"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["refused"] * 3

    def test_models_convert_prints_how_to_use_it(self, folder: Path, tmp_path: Path) -> None:
        """The command names the written files."""
        done = subprocess.run(
            [sys.executable, "-m", "sortd", "models", "convert", str(folder), "-c", str(write_config(tmp_path))],
            capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in done.stdout
        assert f"set `model: {folder}`" in " ".join(done.stdout.split())
