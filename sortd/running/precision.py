"""The precision that serves: int8 only after it filed the user's own references as float32 does, else float32.

And the backend: where ``backend: auto`` finds that ONNX Runtime does not run the model, torch does, and a warning says
so; asked for by name it is an error.
"""

from collections.abc import Callable
from functools import partial

from sortd import logs
from sortd.classify.held_out import pooled
from sortd.config import Config, DatasetConfig
from sortd.encoder import Encoder, load
from sortd.encoding import exports
from sortd.encoding.backends import choose
from sortd.encoding.export_process import Tell, is_awaited
from sortd.encoding.exports import Exports
from sortd.encoding.manifest import Precision
from sortd.encoding.onnx_encoder import OnnxEncoder
from sortd.encoding.providers import can_use_gpu
from sortd.errors import ModelError
from sortd.references import Teaching
from sortd.running.comparison import Pool, judge
from sortd.running.exporting import export, located, warn
from sortd.running.verdict import Verdict


def load_encoder(
    config: Config,
    *,
    pool: Pool,
    teaching_of: Callable[[DatasetConfig], Teaching],
    tell: Tell,
    attend: Tell = lambda _: None,
    may_prepare: bool = True,
) -> Encoder:
    """Load what the configuration means, exported and judged before where that has to be.

    Args:
        config: the model, the backend, and where the references are.
        pool: hands out the decoders for what an encoder sees.
        teaching_of: returns how a dataset decides.
        tell: hears in a few words what runs the model, and why not something better.
        attend: hears again and again what goes on, while that takes long.
        may_prepare: may it export, judge, and write that down? Else what stands has to do.

    Raises:
        ModelError: the model cannot be had.
    """
    model, words = located(config)
    chosen = choose(config.backend, model, words, device=config.device, cache_dir=config.cache_dir)
    if chosen.name == "torch":
        tell(f"torch; {chosen.why}" if config.backend == "auto" and exports.is_installed() else "torch")
        return load_on(config, "torch")
    try:
        exported = exports.find(model, words, cache_dir=config.cache_dir)
        if exported is None and may_prepare:
            exported = export(config, attend=attend)
        if exported is not None:
            asked = partial(judge, pool=pool, teaching_of=teaching_of, attend=attend, may_prepare=may_prepare)
            encoder, what = _by_onnx(config, exported, lambda: asked(config, exported))
            tell(what)
            return encoder
        tell("torch; the export to ONNX is missing, damaged or old, and `sortd run` makes it")
    except ModelError as error:
        if config.backend != "auto" or not is_awaited():
            raise
        _fell_back("onnx", "torch", str(error))
        tell(f"torch; {error}")
    return load_on(config, "torch")


def _by_onnx(config: Config, exported: Exports, judged: Callable[[], Verdict | None]) -> tuple[Encoder, str]:
    """Load the quickest that ONNX Runtime may serve with, and say in a few words what it is.

    Raises:
        ModelError: not even float32 loads.
    """
    if config.device != "cpu" and can_use_gpu(exports.available_providers()):
        exact = load_on(config, "onnx")
        if isinstance(exact, OnnxEncoder) and exact.runs_on != "CPU":
            return exact, f"onnx fp32 on {exact.runs_on}"
        _fell_back("onnx on the GPU", "onnx on the CPU", "its libraries, or the driver, do not load")
        del exact
    reason = f"int8 would be {exported.manifest.gain:.2f} times as quick, which is not worth it"
    if Precision.INT8 in exported.precisions:
        verdict = judged()
        if verdict is not None and verdict.refusal is None:
            try:
                whole = pooled(verdict.datasets)
                said = f"onnx int8; {whole.same} of {whole.filed} references filed as by fp32"
                return load_on(config, "onnx-int8"), said
            except ModelError as error:
                _fell_back("onnx int8", "onnx fp32", str(error))
                reason = f"int8 does not serve: {error}"
        else:
            told = "it has not been judged on these references" if verdict is None else verdict.refusal
            reason = f"int8 does not serve: {told}"
    return load_on(config, "onnx"), f"onnx fp32; {reason}"


def _fell_back(wanted: str, backend: str, error: str) -> None:
    warn(logs.MODEL_FELL_BACK, wanted=wanted, backend=backend, error=error)


def load_on(config: Config, backend: str) -> Encoder:
    """Load the configured model on a backend; nothing is chosen, exported or judged.

    Raises:
        ModelError: it cannot be had on this backend.
    """
    return load(
        config.model,
        text_model=config.text_model,
        backend=backend,
        device=config.device,
        cache_dir=config.cache_dir,
        threads=config.threads,
        decoding=config.decoding.jpeg,
    )
