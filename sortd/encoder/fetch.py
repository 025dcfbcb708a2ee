"""Downloads models from the hub into sortd's cache; the only module that uses the network."""

import sys
from fnmatch import fnmatch
from pathlib import Path

from sortd.encoder.models import ModelFolder, first_line, repository_of, verify_folder
from sortd.encoder.pickles import PICKLE, convert_folder
from sortd.errors import ModelError

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")  # others beside them are for other programs
_PICKLES = (PICKLE, "pytorch_model-*-of-*.bin")
_OTHERS = ["*.json", "*.txt", "*.model", "README.md"]
_NOT_FETCHED = ["onnx/*", "openvino/*", "*.onnx"]


def fetch(name: str, *, cache_dir: Path | None = None) -> ModelFolder:
    """Download a model from the hub into sortd's cache (None: the hub client's).

    Raises:
        ModelError: no such model, no network, no disk space, or no weights in a format that sortd loads.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository = repository_of(name)
    target = None if cache_dir is None else str(cache_dir / "models")
    wanted = [*_OTHERS, *(form for weights in _WEIGHTS for form in (weights, f"*/{weights}"))]
    try:
        folder = Path(
            snapshot_download(repository, cache_dir=target, allow_patterns=wanted, ignore_patterns=_NOT_FETCHED)
        )
        offered = HfApi().list_repo_files(repository, revision=folder.name)
        pickles = [path for path in offered if _is_only_form(path, offered)]
        if pickles:
            snapshot_download(repository, cache_dir=target, allow_patterns=pickles, revision=folder.name)
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"cannot fetch {name}: HF_HUB_OFFLINE forbids the network; unset it for this command"
        ) from error
    except Exception as error:  # the errors of the client's HTTP library change from version to version
        raise ModelError(
            f"cannot fetch {name}: {first_line(error)}; check the name and the network, or copy the model's "
            f"folder from another machine and set `model:` to its path"
        ) from error
    if pickles:
        convert_folder(name, folder)
    return verify_folder(name, folder)


def _is_only_form(path: str, offered: list[str]) -> bool:
    """Tell whether a file is a pickle without safetensors for transformers beside it, as in the oldest CLIPs."""
    folder, _, file = path.rpartition("/")
    beside = [other.rpartition("/")[2] for other in offered if other.rpartition("/")[0] == folder]
    return any(fnmatch(file, form) for form in _PICKLES) and not any(
        fnmatch(other, form) for other in beside for form in _WEIGHTS
    )
