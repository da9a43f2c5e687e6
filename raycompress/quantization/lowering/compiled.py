"""Programs on torch's compiler for CPUs (inductor), whose integer kernels are oneDNN's.

The compiler looks for patterns, and what it doesn't find it computes in float without a word. So
the kernels are counted in what it made. They have no names: each is known by the scales of its
weight, which it is given.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_unflatten

from raycompress.artifacts.export import first_line
from raycompress.errors import ArtifactError, InputError
from raycompress.quantization.lowering.lowered import check_integers

__all__ = ["CompiledProgram"]

_ATEN, _QUANTIZED = torch.ops.aten, torch.ops.quantized_decomposed
_PRODUCTS = (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default)
_RESHAPES = (_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints)


class CompiledProgram(nn.Module):
    """A program, called as the module that it was made of, in evaluation.

    It is compiled at its first call with one example, and at its first call with more, for as many
    threads as torch has then; each takes seconds. Weights become constants.

    Args:
        program: On the CPU; layers with a dequantized weight and a dequantized input are to run in
            integers.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program
        _, scales = _flat(program)
        self.layers = tuple(scales)
        """Names of those that are to run in integers."""
        self._runs: dict[bool, tuple[Any, bool]] = {}
        values = _values(program)
        self._dtypes = [value.dtype for value in values]
        self._shapes = [tuple(_size(size) for size in value.shape) for value in values]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors on the CPU.

        Raises:
            InputError: They haven't the shapes and dtypes that the program takes.
            VerificationError: Compiled now, with fewer layers in integers than the program has.
            ArtifactError: The compiler failed.
        """
        names = self.program.call_spec.in_spec.child(1).context
        values = tree_leaves((args, [kwargs[name] for name in names or () if name in kwargs]))
        tensors = [value for value in values if isinstance(value, Tensor)]
        single = self._is_single(tensors)
        with torch.no_grad():
            if single not in self._runs:
                self._runs[single] = self._compile(single, tensors)
            run, writes = self._runs[single]
            # Fused additions add to the tensor that they are given, even if it is the caller's.
            own = [
                t.clone(memory_format=torch.contiguous_format) if writes else t.contiguous()
                for t in tensors
            ]
            answers = run(*own)
        return tree_unflatten(answers, self.program.call_spec.out_spec)

    def _is_single(self, tensors: list[Tensor]) -> bool:
        """Whether tensors, which must be of the shapes that are taken, are of one example."""
        sizes = set()
        fits = len(tensors) == len(self._shapes)
        for tensor, shape, dtype in zip(tensors, self._shapes, self._dtypes, strict=False):
            fits = fits and tensor.dtype == dtype and tensor.dim() == len(shape)
            if fits:
                wanted = [s for s, size in zip(tensor.shape, shape, strict=True) if size is None]
                sizes |= set(wanted)
                fits = all(size in (None, s) for s, size in zip(tensor.shape, shape, strict=True))
        if not fits or len(sizes) > 1 or 0 in sizes:
            raise InputError(
                f"the program takes {_shown(zip(self._shapes, self._dtypes, strict=True))}, got "
                f"{_shown((tuple(t.shape), t.dtype) for t in tensors)}"
            )
        return sizes == {1}

    def _compile(self, single: bool, tensors: list[Tensor]) -> tuple[Any, bool]:
        """What runs flat lists of tensors, and whether it may write to them."""
        module, scales = _flat(self.program)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        values: list[Any] = []
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            # Sizes that equal each other are one; the compiler takes a free size to be 2 or more.
            free = [
                DimDynamic.DUCK if s is None and not single else DimDynamic.STATIC for s in shape
            ]
            context: Any = StatelessSymbolicContext(dynamic_sizes=free)
            values.append(mode.from_tensor(tensor.contiguous(), symbolic_context=context))
        kernels = _Kernels()
        options = {"freezing": True, "post_grad_custom_pre_pass": kernels}
        # Products of one row with a small matrix would become sums, in float.
        rules = {k: v for k, v in select_decomp_table().items() if k not in _PRODUCTS}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = compile_fx(module, values, config_patches=options, decompositions=rules)
        except Exception as error:  # the compiler raises all kinds
            raise ArtifactError(
                f"inductor can't compile the program: {type(error).__name__}: {first_line(error)}"
            ) from error
        asked = Counter(key for keys in scales.values() for key in keys)
        integer = [
            name
            for name, keys in scales.items()
            if all(kernels.found[key] >= asked[key] for key in keys)
        ]
        check_integers("inductor", self.layers, integer)
        return run, kernels.adds


class _Kernels(CustomGraphPass):
    """Finds the integer kernels in a graph that is about to become code."""

    def __init__(self) -> None:
        self.found: Counter[bytes] = Counter()
        self.adds = False

    def __call__(self, graph: fx.Graph) -> None:
        """Kernels have the scales of the weight as their fifth argument."""
        for node in graph.nodes:
            operator = node.target
            if isinstance(operator, torch._ops.OpOverload) and operator.namespace == "onednn":
                scale = node.args[4]
                self.adds |= "binary" in operator._overloadname
                if "pointwise" in str(operator) and scale.op == "get_attr":
                    self.found[_bytes(getattr(graph.owning_module, scale.target))] += 1

    def uuid(self) -> None:
        """None: compile anew, for what comes from a cache isn't seen here."""


def _flat(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, dict[str, list[bytes]]]:
    """The program from tensors to tensors, with patterns that the compiler knows.

    It knows a weight that one layer reads, once: each reader gets scales of its own. A weight whose
    input is in float is made float here, once.

    Returns:
        The program, and of each layer that is to run in integers the scales, once for each call.
    """
    traced = program.module(check_guards=False)
    module = fx.GraphModule(traced, traced.graph)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    scales: dict[str, list[bytes]] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta["val"], Tensor):
            graph.erase_node(node)  # what isn't a tensor is a constant
        if node.target is not _QUANTIZED.dequantize_per_channel.default:
            continue
        name = node.args[0].target.rpartition(".")[0]
        for user in list(node.users):
            weight, scale, zeros = (_tensor(module, each.target) for each in node.args[:3])
            with graph.inserting_before(user):
                if _is_integer(user, node):
                    scales.setdefault(name, []).append(_bytes(scale))
                    if _reads_one_channel(user, weight):
                        weight = _read_two(module, user, weight)
                    tensors = [_constant(module, each) for each in (weight, scale.clone(), zeros)]
                    new = graph.call_function(node.target, (*tensors, *node.args[3:]))
                else:
                    new = _constant(module, node.target(weight, scale, zeros, *node.args[3:]))
            user.replace_input_with(node, new)
        graph.erase_node(node)
    module.recompile()
    return module, scales


def _is_integer(user: fx.Node, weight: fx.Node) -> bool:
    """Whether a node is a layer of a weight, with an input that is dequantized."""
    if len(user.args) < 2 or user.args[1] is not weight:
        return False
    value: Any = user.args[0]
    while value.target in _RESHAPES:
        value = value.args[0]
    return value.target is _QUANTIZED.dequantize_per_tensor.default


def _reads_one_channel(layer: fx.Node, weight: Tensor) -> bool:
    groups: Any = layer.args[6] if len(layer.args) > 6 else 1
    return bool(weight.dim() > 2 and weight.shape[1] == 1 and groups == 1)


def _read_two(module: fx.GraphModule, layer: fx.Node, weight: Tensor) -> Tensor:
    """Gives a convolution of one channel a second one, of zeros; returns its weight.

    For one channel at any batch size, the compiler and its kernel disagree on the layout of what
    is returned.
    """
    back: Any = layer.args[0]
    quantized = back.args[0]
    sizes = [0, 0] * (weight.dim() - 2) + [0, 1]
    value = module.graph.call_function(
        _ATEN.constant_pad_nd.default, (quantized.args[0], sizes, 0.0)
    )
    value = module.graph.call_function(quantized.target, (value, *quantized.args[1:]))
    value = module.graph.call_function(back.target, (value, *back.args[1:]))
    layer.replace_input_with(back, value)
    return functional.pad(weight, sizes)


def _constant(module: fx.GraphModule, tensor: Tensor) -> fx.Node:
    name = f"constant_{len(module._buffers)}"
    module.register_buffer(name, tensor)
    return module.graph.get_attr(name)


def _values(program: torch.export.ExportedProgram) -> list[Tensor]:
    """What the program was traced with, as tensors without numbers."""
    given = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in given]
    return [n.meta["val"] for n in nodes if isinstance(n.meta["val"], Tensor)]


def _size(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _shown(tensors: Any) -> str:
    """For people: shapes and dtypes."""
    shapes = [
        f"({', '.join('batch' if size is None else str(size) for size in shape)}) of "
        f"{str(dtype).removeprefix('torch.')}"
        for shape, dtype in tensors
    ]
    return " and ".join(shapes) or "no tensors"


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()
