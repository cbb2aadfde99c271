"""What a part of a graph computes, found out by running it: masks, positions, sizes, attention itself.

Only index arithmetic and what is fed can be evaluated: a part that reads token ids (and so the weights) is
refused, so probing costs little however large the model is. The shapes of activations are worked out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from relay_attention.errors import ExportError
from relay_attention.export.float32_form import to_float32

Array = npt.NDArray[Any]
SPARE = 3  # slots of a static cache behind the valid ones, which must not be seen
INPUT_IDS, ATTENTION_MASK, POSITION_IDS, CACHE_POSITION = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
)


class ProbeError(ExportError):
    """A value cannot be evaluated."""


@dataclass(frozen=True)
class Setting:
    """Sizes of one call: rows, new tokens of each, tokens that each has cached; no padding anywhere."""

    batch: int
    sequence: int
    past: int

    @property
    def total(self) -> int:
        return self.past + self.sequence


# sizes that nothing else is likely to have, to tell constant dimensions from others
_FIRST, _SECOND = (2, 5, 7), (3, 11, 13)
_SAME_SHAPE = {
    "Cast", "Clip", "CumSum", "Dropout", "Elu", "Erf", "Gelu", "HardSwish", "Identity", "IsNaN",
    "LayerNormalization", "LeakyRelu", "LogSoftmax", "Neg", "Not", "RMSNormalization", "Reciprocal", "Relu",
    "RotaryEmbedding", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh", "FastGelu",
    "QuickGelu", "BiasGelu", "Abs", "Exp", "Cos", "Sin", "Trilu", "TensorScatter", "AttentionForm",
    "Attention", "MultiHeadAttention",
}  # fmt: skip
_BROADCAST = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod",
    "Mul", "Or", "Pow", "Sub", "Where", "Xor",
}  # fmt: skip
_REDUCTIONS = {f"Reduce{kind}" for kind in ("L1", "L2", "Max", "Mean", "Min", "Sum", "SumSquare")}


class Probe:
    """Evaluates values of a model for settings.

    past_lengths, total_lengths: names of inputs [batch] that hold, per row, tokens cached before a call and
    after it. longest: tokens, past and new, that settings may reach.
    """

    def __init__(
        self,
        model: ir.Model,
        past_lengths: Sequence[str] = (),
        total_lengths: Sequence[str] = (),
        has_past: bool = True,
        longest: int = 512,
    ):
        self.model = model
        self.past_lengths, self.total_lengths = set(past_lengths), set(total_lengths)
        self.has_past = has_past
        self._sessions: dict[tuple[ir.Value, ...], tuple[Any, list[ir.Value], list[ir.Value]]] = {}
        self._shapes: dict[tuple[ir.Value, Setting], tuple[int, ...] | None] = {}
        self._symbols: dict[Setting, dict[str, int]] = {}
        self._order = {node: index for index, node in enumerate(model.graph)}
        self.activations = activations(model)
        static = [
            value.shape[2]
            for value in model.graph.inputs
            if is_cache(value) and value.shape is not None and len(value.shape) == 4 and _is_scattered(value)
        ]
        # tokens that static caches hold; tokens, past and new, of the longest settings
        self.capacity = min((size for size in static if isinstance(size, int)), default=None)
        self.longest = min(longest, _LONGEST, self.capacity or _LONGEST)

    def anew(self) -> Probe:
        """A probe of the model as it is now, with the same inputs known."""
        lengths = sorted(self.past_lengths), sorted(self.total_lengths)
        return Probe(self.model, *lengths, self.has_past, self.longest)

    def setting(self, batch: int, sequence: int, past: int) -> Setting:
        """A setting, without a past where the graph takes none."""
        return Setting(batch, sequence, past if self.has_past else 0)

    def evaluate(
        self, targets: Sequence[ir.Value], setting: Setting, feeds: dict[ir.Value, Array] | None = None
    ) -> list[Array]:
        """Values of the graph at a setting; `feeds` stand for values instead of what makes them.

        Raises: ProbeError naming what cannot be evaluated.
        """
        feeds = feeds or {}
        key = (*targets, *feeds)
        if key not in self._sessions:
            self._sessions[key] = self._session(targets, feeds, setting)
        session, leaves, cuts = self._sessions[key]
        inputs = {}
        for value in leaves:
            inputs[str(value.name)] = feeds[value] if value in feeds else self._input(value, setting)
        for value in cuts:
            node = value.producer()
            assert node is not None
            inputs[str(value.name)] = self._cut(node, setting, feeds)
        try:
            return [np.asarray(result) for result in session.run(None, inputs)]
        except Exception as error:  # onnxruntime raises many kinds
            raise ProbeError(f"it does not run at {setting}: {_first_line(error)}") from error

    def shape(
        self, value: ir.Value, setting: Setting, feeds: dict[ir.Value, Array] | None = None
    ) -> tuple[int, ...] | None:
        """Shape of a value at a setting, None where it cannot be told."""
        if feeds and value in feeds:
            return tuple(feeds[value].shape)
        if (value, setting) not in self._shapes:
            for each in self._unknown(value, setting):
                try:
                    self._shapes[each, setting] = self._shape(each, setting)
                except (ProbeError, ValueError, TypeError, IndexError, KeyError):
                    self._shapes[each, setting] = None
        return self._shapes[value, setting]

    def _unknown(self, value: ir.Value, setting: Setting) -> list[ir.Value]:
        """What a value depends on whose shape is not known yet, and the value, in graph order."""
        found: dict[ir.Value, int] = {}
        pending = [value]
        while pending:
            current = pending.pop()
            if current in found or (current, setting) in self._shapes:
                continue
            node = current.producer()
            found[current] = -1 if node is None else self._order.get(node, -1)
            if node is not None and self._shape_by_symbols(current, setting) is None:
                pending.extend(operand for operand in node.inputs if operand is not None)
        return sorted(found, key=found.__getitem__)

    def axes(self, value: ir.Value) -> tuple[int | str, ...] | None:
        """Shape with constant dimensions as numbers, others as "B" (batch), "S" (sequence) or "?"."""
        first, second = self.setting(*_FIRST), self.setting(*_SECOND)
        left, right = self.shape(value, first), self.shape(value, second)
        if left is None or right is None or len(left) != len(right):
            return None
        letters = {(first.batch, second.batch): "B", (first.sequence, second.sequence): "S"}
        return tuple(a if a == b else letters.get((a, b), "?") for a, b in zip(left, right, strict=True))

    def scalar(self, value: ir.Value | None) -> float | None:
        """A value that is one number at every setting; None if it is not."""
        if value is None:
            return None
        found = []
        # at the longest too: a factor may grow with the length past some length
        for setting in (self.setting(*_FIRST), self.setting(*_SECOND), self.setting(1, 1, self.longest - 1)):
            try:
                array = self.evaluate([value], setting)[0]
            except ProbeError:
                return None
            if array.size != 1:
                return None
            found.append(float(array.reshape(-1)[0]))
        return found[0] if len(set(found)) == 1 else None

    def knows(self, value: ir.Value) -> bool:
        """Whether it is known what an input of the graph is given."""
        if value.name == INPUT_IDS or is_cache(value):
            return True
        try:
            self._input(value, self.setting(*_FIRST))
        except ProbeError:
            return False
        return True

    # -- leaves

    def _input(self, value: ir.Value, setting: Setting) -> Array:
        name, rank = str(value.name), len(value.shape) if value.shape is not None else None
        dtype = fed_dtype(value, np.int64)
        steps = np.arange(setting.past, setting.total)
        if name == ATTENTION_MASK and rank in (2, None):
            return np.ones((setting.batch, setting.total), dtype)
        if name == POSITION_IDS and rank in (2, None):
            return np.broadcast_to(steps, (setting.batch, setting.sequence)).astype(dtype)
        if name == CACHE_POSITION and rank in (1, None):
            return steps.astype(dtype)
        for names, length in ((self.past_lengths, setting.past), (self.total_lengths, setting.total)):
            if name in names:
                return np.full([] if rank == 0 else [setting.batch], length, dtype)
        if name == INPUT_IDS:
            raise ProbeError("it depends on the token ids")
        raise ProbeError(f"it depends on the input {name!r} (rank {rank}), whose meaning is not known")

    def _input_shape(self, value: ir.Value, setting: Setting) -> tuple[int, ...] | None:
        if value.name == INPUT_IDS:
            return (setting.batch, setting.sequence)
        if is_cache(value):
            assert value.shape is not None
            past = setting.total + SPARE if _is_scattered(value) else setting.past
            dims = [dim if isinstance(dim, int) else past for dim in value.shape]
            if not isinstance(value.shape[0], int):
                dims[0] = setting.batch
            return tuple(dims)
        return tuple(self._input(value, setting).shape)

    def _bound(self, setting: Setting) -> dict[str, int]:
        """What the names of the inputs' dimensions stand for."""
        if setting not in self._symbols:
            symbols: dict[str, int] = {}
            for value in self.model.graph.inputs:
                try:
                    shape = self._input_shape(value, setting)
                except ProbeError:
                    continue
                if shape is None or value.shape is None or len(shape) != len(value.shape):
                    continue
                for dim, size in zip(value.shape, shape, strict=True):
                    if not isinstance(dim, int) and dim.value and re.fullmatch(r"\w+", dim.value):
                        symbols.setdefault(dim.value, size)
            self._symbols[setting] = symbols
        return self._symbols[setting]

    # -- shapes

    def _shape(self, value: ir.Value, setting: Setting) -> tuple[int, ...] | None:
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                return self._input_shape(value, setting)
            return tuple(value.const_value.shape) if value.const_value is not None else None
        by_symbols = self._shape_by_symbols(value, setting)
        if by_symbols is not None:
            return by_symbols
        by_rule = self._shape_by_rule(node, value, setting)
        if by_rule is None and value not in self.activations:
            return self.evaluate([value], setting)[0].shape
        return by_rule

    def _shape_by_symbols(self, value: ir.Value, setting: Setting) -> tuple[int, ...] | None:
        if value.shape is None:
            return None
        symbols, dims = self._bound(setting), []
        for dim in value.shape:
            if isinstance(dim, int):
                dims.append(dim)
                continue
            terms = re.split(r"\s*\+\s*", dim.value) if dim.value else [""]
            sizes = [int(term) if term.isdigit() else symbols.get(term) for term in terms]
            if None in sizes:
                return None
            dims.append(sum(size for size in sizes if size is not None))
        return tuple(dims)

    def _shape_by_rule(self, node: ir.Node, value: ir.Value, setting: Setting) -> tuple[int, ...] | None:
        def of(index: int) -> tuple[int, ...]:
            operand = node.inputs[index]
            shape = self.shape(operand, setting) if operand is not None else None
            if shape is None:
                raise ProbeError("unknown shape")
            return shape

        def ints(index: int) -> list[int]:
            operand = node.inputs[index] if index < len(node.inputs) else None
            if operand is None:
                raise ProbeError("no operand")
            return [int(item) for item in self.evaluate([operand], setting)[0].reshape(-1)]

        op = node.op_type
        if op in _SAME_SHAPE:
            # the sum is the fourth output of SkipLayerNormalization
            return of(0) if list(node.outputs).index(value) in (0, 3) else None
        if op == "DynamicQuantizeLinear":
            return of(0) if value is node.outputs[0] else ()
        if op in _BROADCAST:
            return np.broadcast_shapes(*(of(i) for i in range(len(node.inputs))))
        if op in ("MatMul", "MatMulInteger"):
            left, right = of(0), of(1)
            if len(left) < 2 or len(right) < 2:
                return None
            return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
        if op == "MatMulNBits":
            return (*of(0)[:-1], node.attributes["N"].as_int())
        if op == "Gather":
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            data = of(0)
            axis %= len(data)
            return (*data[:axis], *of(1), *data[axis + 1 :])
        if op == "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            data = of(0)
            return tuple(data[axis] for axis in perm) if perm else data[::-1]
        if op == "Concat":
            parts = [of(i) for i in range(len(node.inputs))]
            axis = node.attributes["axis"].as_int() % len(parts[0])
            return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])
        if op == "Reshape":
            data, zero = of(0), node.attributes.get("allowzero")
            dims = [
                data[i] if dim == 0 and not (zero and zero.as_int()) else dim for i, dim in enumerate(ints(1))
            ]
            if -1 in dims:
                known = int(np.prod([dim for dim in dims if dim != -1]))
                dims[dims.index(-1)] = int(np.prod(data)) // known
            return tuple(dims)
        if op == "Expand":
            return np.broadcast_shapes(of(0), tuple(ints(1)))
        if op == "Unsqueeze":
            view = np.broadcast_to(np.zeros((), np.int8), of(0))
            return np.expand_dims(view, tuple(ints(1))).shape
        if op == "Squeeze":
            view = np.broadcast_to(np.zeros((), np.int8), of(0))
            return np.squeeze(view, tuple(ints(1)) if len(node.inputs) > 1 else None).shape
        if op == "Slice":
            view = np.broadcast_to(np.zeros((), np.int8), of(0))
            starts, ends = ints(1), ints(2)
            axes = ints(3) if len(node.inputs) > 3 and node.inputs[3] else list(range(len(starts)))
            steps = ints(4) if len(node.inputs) > 4 and node.inputs[4] else [1] * len(starts)
            index = [slice(None)] * view.ndim
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                index[axis] = slice(start, end, step)
            return view[tuple(index)].shape
        if op == "Split":
            sizes = list(of(0))
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            place = list(node.outputs).index(value)
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                sizes[axis] = ints(1)[place]
            else:
                sizes[axis] //= len(node.outputs)
            return tuple(sizes)
        if op in _REDUCTIONS:
            data = of(0)
            over: list[int] = []
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                over = ints(1)
            elif "axes" in node.attributes:
                over = list(node.attributes["axes"].as_ints())
            noop = node.attributes.get("noop_with_empty_axes")
            if not over and not (noop and noop.as_int()):
                over = list(range(len(data)))
            reduced = {axis % len(data) for axis in over}
            if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int():
                return tuple(size for axis, size in enumerate(data) if axis not in reduced)
            return tuple(1 if axis in reduced else size for axis, size in enumerate(data))
        if op == "Gemm":
            trans = {
                name: name in node.attributes and node.attributes[name].as_int()
                for name in ("transA", "transB")
            }
            left, right = of(0), of(1)
            return (left[1] if trans["transA"] else left[0], right[0] if trans["transB"] else right[1])
        return None

    # -- sessions

    def _cut(self, node: ir.Node, setting: Setting, feeds: dict[ir.Value, Array]) -> Array:
        operand = node.inputs[0]
        assert operand is not None
        shape = self.shape(operand, setting, feeds)
        if shape is None:
            raise ProbeError(f"the shape of {operand.name!r} is not known")
        if node.op_type == "Size":
            return np.array(int(np.prod(shape)), np.int64)
        start = node.attributes["start"].as_int() if "start" in node.attributes else None
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        return np.array(shape, np.int64)[start:end]

    def _session(
        self, targets: Sequence[ir.Value], feeds: dict[ir.Value, Array], setting: Setting
    ) -> tuple[Any, list[ir.Value], list[ir.Value]]:
        if not feeds and any(target in self.activations for target in targets):
            raise ProbeError("it depends on the token ids or the caches")
        nodes: set[ir.Node] = set()
        leaves: dict[ir.Value, None] = {}
        cuts: dict[ir.Value, None] = {}
        constants: dict[str, ir.TensorProtocol] = {}
        pending = list(targets)
        seen: set[ir.Value] = set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.producer()
            if value in feeds:
                leaves[value] = None
            elif node is None:
                if value.is_graph_input():
                    self._input(value, setting)  # refuses what cannot be fed
                    leaves[value] = None
                elif value.const_value is not None:
                    constants[str(value.name)] = value.const_value
                else:
                    raise ProbeError(f"{value.name!r} is made by nothing")
            elif node.op_type in ("Shape", "Size") and not node.domain and self._is_cut(node, setting, feeds):
                cuts[value] = None
            else:
                if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                    raise ProbeError(f"{node.op_type} node {node.name!r} is control flow")
                nodes.add(node)
                pending.extend(operand for operand in node.inputs if operand is not None)
        for value in (*leaves, *cuts, *targets):
            if value.dtype is None:
                raise ProbeError(f"the type of {value.name!r} is not known")
        ordered = sorted(nodes, key=lambda node: self._order.get(node, 0))
        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(node) for node in ordered],
            "probe",
            [
                onnx.helper.make_tensor_value_info(str(value.name), value.dtype, None)
                for value in (*leaves, *cuts)
            ],
            [onnx.helper.make_tensor_value_info(str(value.name), value.dtype, None) for value in targets],
            [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
        )
        opsets = [
            onnx.helper.make_opsetid(*item)
            for item in self.model.graph.opset_imports.items()
            if item[0] != "relay"
        ]
        proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=min(self.model.ir_version, 11))
        proto = to_float32(proto)  # of bfloat16, which a CPU does not compute
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # there are many sessions, and each would keep its largest run
        options.enable_mem_pattern = False
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many kinds
            raise ProbeError(f"ONNX Runtime cannot load it by itself: {_first_line(error)}") from error
        return session, list(leaves), list(cuts)

    def _is_cut(self, node: ir.Node, setting: Setting, feeds: dict[ir.Value, Array]) -> bool:
        operand = node.inputs[0]
        return operand is not None and self.shape(operand, setting, feeds) is not None


_LONGEST = 1 << 17
_GRAPHS = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}


def _is_scattered(cache: ir.Value) -> bool:
    return any(node.op_type == "TensorScatter" for node in cache.consumers())


def activations(model: ir.Model) -> set[ir.Value]:
    """Values computed from the token ids, or from what a cache holds, and not from their sizes alone."""
    found = {value for value in model.graph.inputs if value.name == INPUT_IDS or is_cache(value)}
    for node in model.graph:
        if node.op_type not in ("Shape", "Size") and any(operand in found for operand in node.inputs):
            found.update(node.outputs)
    return found


def fed_dtype(value: ir.Value, unknown: npt.DTypeLike = np.float32) -> np.dtype[Any]:
    """Of the arrays that stand for a value when parts of a graph are run: float32 for bfloat16."""
    if value.dtype is None:
        return np.dtype(unknown)
    return np.dtype(np.float32 if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy())


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input is a cache of keys or values, by its type and rank."""
    return (
        value.is_graph_input()
        and value.shape is not None
        and len(value.shape) >= 3
        and value.name not in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
