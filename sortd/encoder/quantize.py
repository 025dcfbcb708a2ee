"""Quantisation of an ONNX graph to int8: matrix products with scales by row, convolutions with calibrated ranges.

Each output column of a weight matrix has its own scale, and each row of an activation (a token of an image) has one,
computed at inference, both symmetric: ``y = (x_q - 128) w_q * row_scale * column_scale``. The dynamic quantisation of
ONNX Runtime uses one scale for a whole batch, so that an image's embedding depends on the other images. Scales by token
are from Yao et al., ZeroQuant, 2022, and Dettmers et al., LLM.int8(), 2022.

Activations of a convolution have no rows. Their range is measured on calibration images and fixed, which keeps images
independent of each other, too (the static quantisation of ONNX Runtime).
"""

import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Pixels
from sortd.events import Preprocessing

FULL_RANGE = 127
"""The largest weight in eight signed bits."""
REDUCED_RANGE = 63
"""In seven: x86 processors without VNNI add two products of an unsigned and a signed byte in 16 bits, which 255 * 127 *
2 overflows and 255 * 63 * 2 does not; see "Data type selection" in ONNX Runtime's page on quantization."""

_CALIBRATION_BATCH = 8
_ZERO_POINT = 128  # activations are stored unsigned, shifted by this: every processor has kernels for this combination
_MIN_SCALE = 1e-12  # of a row of zeros
_EXACT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def processor_flags(processor: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the names of what this processor can do, among other words; none if the system does not list them."""
    with suppress(OSError):
        return frozenset(processor.read_text(encoding="ascii", errors="replace").split())
    return frozenset()


def weight_range(*, machine: str | None = None, processor: Path = Path("/proc/cpuinfo")) -> int:
    """Return the largest quantized weight that a processor, by default this one, multiplies without overflow."""
    if (machine or platform.machine()).lower() not in {"x86_64", "amd64", "i686", "i386"}:
        return FULL_RANGE
    return FULL_RANGE if _EXACT_PRODUCTS & processor_flags(processor) else REDUCED_RANGE


def quantize(source: Path, target: Path, *, largest: int) -> int:
    """Write a float32 graph with its constant matrices in int8; return the number of products (0: nothing is written).

    The opset must be 13 to 17, in which ``ReduceMax`` takes its axes as an attribute.
    """
    import onnx

    model = onnx.load(str(source))
    rewriting = _Rewriting(model.graph, largest)
    nodes = [new for node in model.graph.node for new in rewriting.of(node)]
    if not rewriting.products:
        return 0
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    kept = [tensor for tensor in (*model.graph.initializer, *rewriting.constants) if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, str(target))
    return rewriting.products


def convolutions(source: Path) -> int:
    """Return the number of convolutions in a graph; a vision transformer has one, which makes the patches."""
    import onnx

    return sum(node.op_type == "Conv" for node in onnx.load(str(source), load_external_data=False).graph.node)


def quantize_convolutions(source: Path, target: Path, images: Pixels, *, largest: int) -> None:
    """Write a float32 graph with its convolutions in int8; the ranges are measured on images, uint8 (B, H, W, 3)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]  # the library requires it, and publishes no types
        """Returns the images in batches."""

        def __init__(self) -> None:
            starts = range(0, len(images), _CALIBRATION_BATCH)
            self._batches = ({"pixels": images[start : start + _CALIBRATION_BATCH]} for start in starts)

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self._batches, None)

    quantize_static(
        str(source),
        str(target),
        Images(),
        per_channel=True,
        reduce_range=largest < FULL_RANGE,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )


def photographic_noise(preprocessing: Preprocessing, count: int) -> Pixels:
    """Return images, uint8 (count, H, W, 3), that give a network's activations about the range of photographs.

    They are noise in mixed colours, of random brightness and contrast, whose amplitude falls with frequency as in
    natural scenes, with an exponent around 1 (Field, Relations between the statistics of natural images and the
    response properties of cortical cells, 1987).
    """
    random = np.random.default_rng(0)
    height, width = preprocessing.crop_height, preprocessing.crop_width
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequency[0, 0] = 1 / max(height, width)
    images = np.empty((count, height, width, 3), np.uint8)
    for image in images:
        waves = random.normal(size=(height, width, 3)) + 1j * random.normal(size=(height, width, 3))
        plain = np.fft.ifft2(waves / frequency[:, :, None] ** random.uniform(0.5, 2.0), axes=(0, 1)).real
        mixed = plain @ (np.eye(3) + random.uniform(-0.5, 1.0, (3, 3)))
        scaled = (mixed - mixed.mean()) / mixed.std() * random.uniform(10, 90)
        image[:] = np.clip(scaled + random.uniform(30, 225) + random.uniform(-40, 40, 3), 0, 255)
    return images


# mypy cannot follow the types of onnx's protocol buffers, hence Any from here to the end.
class _Rewriting:
    """One pass over a graph: the rewritten nodes and the constants that they need."""

    def __init__(self, graph: Any, largest: int) -> None:  # noqa: ANN401
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._largest = largest
        self._rows: dict[str, tuple[str, str]] = {}
        self._matrices: dict[tuple[str, bool], tuple[str, str]] = {}
        self.constants: list[Any] = []
        self.products = 0
        self._zero_point = self._constant("int8_zero_point", np.array(_ZERO_POINT, np.uint8))
        self._one = self._constant("int8_one", np.array(1, np.float32))
        self._step = self._constant("int8_step", np.array(1 / 127, np.float32))
        self._min_scale = self._constant("int8_least", np.array(_MIN_SCALE, np.float32))

    def of(self, node: Any) -> Iterator[Any]:  # noqa: ANN401
        """Yield the nodes that replace a node: itself, or the same product in int8."""
        transposed = self._product_layout(node)
        if transposed is None:
            yield node
            return
        from onnx import TensorProto, helper

        self.products += 1
        name = f"int8_{self.products}"
        if node.input[0] not in self._rows:
            yield from self._quantized_rows(node.input[0], name)
        rows, row_scales = self._rows[node.input[0]]
        matrix, column_scales = self._matrix(node.input[1], transposed=transposed)
        shifts = node.input[2] if len(node.input) > 2 else None  # noqa: PLR2004 - Gemm's third input is its bias
        yield helper.make_node("MatMulInteger", [rows, matrix, self._zero_point], [f"{name}_sums"])
        yield helper.make_node("Cast", [f"{name}_sums"], [f"{name}_floats"], to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{name}_floats", column_scales], [f"{name}_columns"])
        output = node.output[0] if shifts is None else f"{name}_product"
        yield helper.make_node("Mul", [f"{name}_columns", row_scales], [output])
        if shifts is not None:
            yield helper.make_node("Add", [output, shifts], [node.output[0]])

    def _product_layout(self, node: Any) -> bool | None:  # noqa: ANN401
        """Return whether the constant matrix of a product is stored transposed; None for other nodes."""
        from onnx import TensorProto, helper

        weight = self._weights.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:  # noqa: PLR2004 - a matrix
            return None
        if node.op_type == "MatMul":
            return False
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        values = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | given
        is_plain = (values["alpha"], values["beta"], values["transA"]) == (1.0, 1.0, 0)
        return bool(values["transB"]) if node.op_type == "Gemm" and is_plain else None

    def _quantized_rows(self, rows: str, name: str) -> Iterator[Any]:
        """Yield the nodes that quantise an activation with a scale for each row, once for all its products."""
        from onnx import helper

        self._rows[rows] = f"{name}_rows", f"{name}_row_scales"
        yield helper.make_node("Abs", [rows], [f"{name}_sizes"])
        yield helper.make_node("ReduceMax", [f"{name}_sizes"], [f"{name}_largest"], axes=[-1], keepdims=1)
        yield helper.make_node("Mul", [f"{name}_largest", self._step], [f"{name}_steps"])
        yield helper.make_node("Max", [f"{name}_steps", self._min_scale], [f"{name}_row_scales"])
        yield helper.make_node("Div", [rows, f"{name}_row_scales"], [f"{name}_scaled"])
        yield helper.make_node("QuantizeLinear", [f"{name}_scaled", self._one, self._zero_point], [f"{name}_rows"])

    def _matrix(self, weight: str, *, transposed: bool) -> tuple[str, str]:
        """Return the names of a weight matrix in int8 and of the scales of its columns."""
        from onnx import numpy_helper

        key = weight, transposed
        if key not in self._matrices:
            values = numpy_helper.to_array(self._weights[weight])
            matrix = values.T if transposed else values
            scales = np.abs(matrix).max(axis=0) / self._largest
            scales = np.where(scales > 0, scales, 1).astype(np.float32)
            quantized = np.ascontiguousarray(np.rint(matrix / scales).astype(np.int8))
            name = f"{weight}_int8{'_transposed' if transposed else ''}"
            self._matrices[key] = self._constant(name, quantized), self._constant(f"{name}_scales", scales)
        return self._matrices[key]

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(values, name))
        return name
