"""The default routing rules: what Flax's names and shapes say about each leaf.

A rule either recognizes a leaf or limits how its axes can be read. If several readings
remain, or none, the leaf is ambiguous: the rules never guess.
"""

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from optax_matrix._layout import MatrixLayout


class Leaf(NamedTuple):
    """What the rules know about a leaf."""

    names: tuple[str, ...]  # modules, outermost first, then the leaf's own name
    shape: tuple[int, ...]


class Decision(NamedTuple):
    """Which optimizer a leaf takes, and why.

    An auxiliary leaf that reads features out, as an output head and a router do, says
    how its axes are read, or "unknown".
    """

    optimizer: Literal["matrix", "auxiliary", "ambiguous"]
    reason: str
    layout: MatrixLayout | None = None
    readout: MatrixLayout | Literal["unknown"] | None = None


class _Reading(NamedTuple):
    """How many axes of (batch..., inputs..., outputs...) are batch and outputs."""

    batch: int
    outputs: int


_NORMS = {"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm"}
_NORMS |= {"ln", "bn", "gn", "rms"}
_EMBEDDINGS = {"embed", "embeds", "embedding", "embeddings", "embedder", "emb"}
_EMBEDDINGS |= {"posemb", "posembed", "wte", "wpe"}
_HEADS = {"head", "lmhead", "classifier", "unembed", "unembedding", "logits", "readout"}
_VECTORS = {"bias", "biases", "scale", "scales", "gain", "gamma", "beta", "offset"}
_TOKENS = {"cls", "token", "tokens"}
_POSITIONS = {"pos", "position", "positional"}
_EXPERTS = {"expert", "experts", "moe"}
_EXPERT_LEAVES = {"w", "wi", "wo", "gate", "up", "down", "in", "out", "proj", "kernel"}
# Modules that together identify attention, and those whose outputs are (heads, width).
_ATTENTION = (("query", "key", "value"), ("wkv_a", "wkv_b"))
_HEADED = {"query", "key", "value", "wq_b", "wkv_b"}


@functools.cache
def _tokens(name: str) -> tuple[str, ...]:
    """Returns the words of a name, numbers dropped: ``LayerNorm_0`` is layer, norm."""
    name = re.sub(r"(_?\d+[dD]?)+$", "", name).replace("MoE", "Moe")
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return tuple(word.lower() for word in words)


def _last(name: str) -> str:
    return (_tokens(name) or ("",))[-1]


def _is_head(name: str) -> bool:
    tokens = set(_tokens(name))
    if tokens & {"multi", "attention", "attn", "pre"}:  # AttentionHead, pre_logits
        return False
    if name == "embed_out" or _tokens(name)[:1] == ("logits",):
        return True
    return _last(name) in _HEADS


def _is_embedding(name: str) -> bool:
    return _last(name) in _EMBEDDINGS


def _vector_name(leaf: Leaf) -> str | None:
    """Returns why a leaf with this name or shape is always auxiliary, or None."""
    name = leaf.names[-1] if leaf.names else ""
    last = _last(name)
    if len(leaf.shape) < 2:
        return "fewer than 2 axes"
    if last in _VECTORS:
        return f"leaf named '{name}'"
    if last in _EMBEDDINGS or last in _TOKENS or set(_tokens(name)) & _POSITIONS:
        return f"embedding: leaf named '{name}'"
    return None


def _is_norm(leaf: Leaf) -> bool:
    if _last(leaf.names[-1]) == "scale":
        return True
    return any(_last(module) in _NORMS for module in leaf.names[-2:-1])


def _is_experts(name: str) -> bool:
    return bool(_EXPERTS & set(_tokens(name)))


def _without(shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that the leaf has in a single layer of the stack."""
    return tuple(size for axis, size in enumerate(shape) if axis not in stack)


class _Tree:
    """The leaves by module, and the evidence that several leaves give together."""

    def __init__(self, leaves: Sequence[Leaf]):
        self._below: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves:
            for depth in range(len(leaf.names)):
                self._below.setdefault(leaf.names[:depth], []).append(leaf)
        self._stacks = {module: self._find_stack(module) for module in self._below}

    def sibling(self, leaf: Leaf, name: str) -> tuple[int, ...] | None:
        """Returns the shape of the leaf called `name` in the same module."""
        for other in self._below[leaf.names[:-1]]:
            if other.names == (*leaf.names[:-1], name):
                return other.shape
        return None

    def in_attention(self, leaf: Leaf) -> bool:
        """Returns whether attention projections lie beside the leaf's module."""
        parent = leaf.names[:-2]
        return any(
            all((*parent, name) in self._below for name in names)
            for names in _ATTENTION
        )

    def in_experts(self, leaf: Leaf) -> bool:
        """Returns whether a module of experts contains the leaf.

        An outer module with norms does not count: ``moe_layers`` contains whole layers.
        """
        modules = leaf.names[:-1]
        return any(
            _is_experts(name)
            and (depth == len(modules) or not self._norms(modules[:depth]))
            for depth, name in enumerate(modules, start=1)
        )

    def is_gate(self, leaf: Leaf) -> bool:
        """Returns whether the leaf is a gate kernel with one output per expert.

        Inside an expert, a gate is an ordinary projection.
        """
        parent, module, name = leaf.names[:-2], leaf.names[-2:-1], leaf.names[-1]
        if name != "kernel" or not parent or not _is_experts(parent[-1]):
            return False
        stack, _ = self.stack(leaf)
        beside = [_without(other.shape, stack) for other in self._below[parent]]
        experts = {shape[0] for shape in beside if len(shape) == 3}
        shape = _without(leaf.shape, stack)
        return _last(module[0]) == "gate" and len(shape) == 2 and shape[-1] in experts

    def expert_batches(self, leaf: Leaf) -> int:
        """Returns how many different batch shapes the module's own leaves have."""
        depth, (stack, _) = len(leaf.names), self.stack(leaf)
        beside = self._below[leaf.names[:-1]]
        shapes = [
            _without(one.shape, stack) for one in beside if len(one.names) == depth
        ]
        return len({shape[:-2] for shape in shapes if len(shape) > 2})

    def matrices_below(self, module: tuple[str, ...]) -> int:
        """Returns how many leaves below are not vectors by name or shape."""
        return sum(_vector_name(leaf) is None for leaf in self._below[module])

    def stack(self, leaf: Leaf) -> tuple[tuple[int, ...], str]:
        """Returns the stack axes of the leaf, and why they are unknown or "".

        The norms in the modules around the leaf give the axes. The module with the most
        stack axes decides; among equals the outermost, where the most leaves agree.
        """
        around = [leaf.names[:depth] for depth in range(len(leaf.names))]
        stack = max((self._stacks[module] or () for module in around), key=len)
        objecting = [module for module in around if self._stacks[module] is None]
        if stack or not objecting:
            return stack, ""
        return (), (
            f"norms in '{'/'.join(objecting[-1])}' are stacked, but not on axis 0 or "
            "another axis that all leaves in it share"
        )

    def _norms(self, module: tuple[str, ...]) -> list[Leaf]:
        return [leaf for leaf in self._below[module] if _is_norm(leaf)]

    def _find_stack(self, module: tuple[str, ...]) -> tuple[int, ...] | None:
        """Returns the axes that stack the leaves below, or None if they are unknown.

        In a single layer, the scale of a norm has one axis, its width. If every norm
        below has more axes, all but one are stack axes, and every leaf below has the
        same sizes on them. If several choices fit, leading axes are preferred.

        Axes that do not lead need more evidence, because the scale (heads, head_dim) of
        a per-head norm can look like a stack of head_dim layers. The width of a norm
        must differ from the stack's sizes and also occur in a leaf that is not a norm.
        """
        leaves, norms = self._below[module], self._norms(module)
        norm = min((leaf.shape for leaf in norms), key=len, default=())
        depth = len(norm) - 1
        if depth < 1:
            return ()
        shared = [
            axis
            for axis, size in enumerate(norm)
            if all(leaf.shape[axis : axis + 1] == (size,) for leaf in leaves)
        ]
        stack = tuple(shared[:depth])
        if len(stack) < depth:
            return None
        if stack == tuple(range(depth)):
            return stack

        def widths(leaves: list[Leaf]) -> set[int]:
            return {size for leaf in leaves for size in _without(leaf.shape, stack)}

        others = [leaf for leaf in leaves if not _is_norm(leaf)]
        common = widths(norms) & widths(others) - {norm[axis] for axis in stack}
        return stack if common else None


def _all_readings(ndim: int) -> set[_Reading]:
    return {
        _Reading(batch, outputs)
        for batch in range(ndim - 1)
        for outputs in range(1, ndim - batch)
    }


def _named_readings(leaf: Leaf, ndim: int, tree: _Tree) -> tuple[list[_Reading], str]:
    """Returns the readings that the module's name allows, most likely first, and why.

    Both are empty if the name says nothing. `ndim` does not count stack axes.
    """
    module = leaf.names[-2] if len(leaf.names) > 1 else ""
    last_two = _Reading(ndim - 2, 1)
    if tree.in_experts(leaf):
        return [last_two], "expert stack"
    if module in _HEADED and tree.in_attention(leaf):
        return [_Reading(ndim - 3, 2), last_two], "attention projection"
    if module == "out" and tree.in_attention(leaf):
        return [_Reading(ndim - 3, 1), last_two], "attention output"
    tokens = set(_tokens(module))
    if "conv" in tokens:
        return [_Reading(batch, 1) for batch in range(ndim - 1)], "convolution"
    if tokens & {"dense", "linear"} and "general" not in tokens:
        return [last_two], "stacked dense layers"
    return [], ""


def _bias_readings(
    kernel: tuple[int, ...], bias: tuple[int, ...], readings: set[_Reading]
) -> set[_Reading]:
    """Returns the readings whose (batch..., outputs...) is the shape of the bias."""
    return {
        reading
        for reading in readings
        if kernel[: reading.batch] + kernel[-reading.outputs :] == bias
    }


def _as_layout(reading: _Reading, ndim: int, stack: tuple[int, ...]) -> MatrixLayout:
    """Returns the layout of a leaf, stack axes included."""
    axes = _without(tuple(range(-ndim, 0)), stack)

    def side(start: int, stop: int) -> int | tuple[int, ...]:
        return axes[start] if stop - start == 1 else axes[start:stop]

    middle = len(axes) - reading.outputs
    return MatrixLayout(side(reading.batch, middle), side(middle, len(axes)))


def _read_kernel(leaf: Leaf, tree: _Tree) -> Decision:
    """Reads a Flax kernel: (batch..., inputs..., outputs...) in every layer."""
    stack, objection = tree.stack(leaf)
    shape = _without(leaf.shape, stack)
    if len(leaf.shape) == 2:
        if stack:
            stacked = " and ".join(f"axis {axis} is a stack" for axis in stack)
            return Decision("ambiguous", f"contradictory: its norms say {stacked}")
        return Decision("matrix", "kernel", MatrixLayout())

    readings = _all_readings(len(shape))
    evidence = []
    named, kind = _named_readings(leaf, len(shape), tree)
    if named:
        readings &= set(named)
        evidence.append(f"module '{leaf.names[-2]}' ({kind})")
    bias = tree.sibling(leaf, "bias")
    if bias is not None:
        readings = _bias_readings(shape, _without(bias, stack), readings)
        evidence.append(f"bias {bias}")
    if stack:
        sizes = tuple(leaf.shape[axis] for axis in stack)
        places = " and ".join(f"axis {axis}" for axis in stack)
        leading = stack == tuple(range(len(stack)))
        evidence.append(f"norms stacked {sizes}" + ("" if leading else f" on {places}"))
        # The norms show the whole batch unless other evidence excludes that.
        readings = {one for one in readings if one.batch == 0} or readings
    if not evidence:
        unknown = "no name, bias or norm says how to read its axes"
        return Decision("ambiguous", objection or unknown)
    told = ", ".join(evidence)
    if not readings:
        return Decision("ambiguous", f"contradictory: {told}")
    if len(readings) > 1 and named and bias is None:
        readings = {next(reading for reading in named if reading in readings)}
    if len(readings) > 1:
        return Decision("ambiguous", f"several readings fit: {told}")
    (reading,) = readings
    # Where the stack is unknown, only a name and a bias together exclude a misreading.
    if objection and not (named and bias is not None):
        return Decision("ambiguous", f"{objection}; {told}")
    layout = _as_layout(reading, len(leaf.shape), stack)
    return Decision("matrix", f"kernel: {told}", layout)


def _read_experts(leaf: Leaf, tree: _Tree) -> Decision:
    """Reads a leaf like ``moe/wi``: (experts, inputs, outputs) in every layer."""
    name, words = leaf.names[-1], set(_tokens(leaf.names[-1]))
    stack, objection = tree.stack(leaf)
    ndim = len(leaf.shape) - len(stack)
    if ndim < 3 or not words or not words <= _EXPERT_LEAVES:
        return Decision("ambiguous", f"no rule knows a leaf named '{name}'")
    if tree.expert_batches(leaf) > 1:
        return Decision("ambiguous", "expert stacks of different batch axes")
    if objection:
        return Decision("ambiguous", objection)
    layout = _as_layout(_Reading(ndim - 2, 1), len(leaf.shape), stack)
    return Decision("matrix", f"expert stack: leaf named '{name}'", layout)


def _readout(leaf: Leaf, tree: _Tree) -> MatrixLayout | Literal["unknown"]:
    """Reads the kernel (inputs..., outputs) of a head or a router in every layer."""
    stack, objection = tree.stack(leaf)
    if leaf.names[-1] != "kernel" or objection or len(leaf.shape) - len(stack) < 2:
        return "unknown"
    return _as_layout(_Reading(0, 1), len(leaf.shape), stack)


def _decide(leaf: Leaf, tree: _Tree) -> Decision:
    vector = _vector_name(leaf)
    if vector is not None:
        return Decision("auxiliary", vector)
    name, modules = (leaf.names[-1], leaf.names[:-1]) if leaf.names else ("", ())
    module = modules[-1] if modules else ""

    for depth, ancestor in enumerate(modules, start=1):
        for kind, matches in (("output head", _is_head), ("embedding", _is_embedding)):
            if matches(ancestor) and tree.matrices_below(modules[:depth]) == 1:
                readout = _readout(leaf, tree) if matches is _is_head else None
                reason = f"{kind}: module '{ancestor}'"
                return Decision("auxiliary", reason, readout=readout)
    for ancestor in modules:
        if _is_head(ancestor) or _is_embedding(ancestor):
            return Decision(
                "ambiguous", f"one of several matrices in module '{ancestor}'"
            )
    if _last(module) == "router" or _last(name) == "router" or tree.is_gate(leaf):
        return Decision("auxiliary", "router", readout=_readout(leaf, tree))
    if _last(module) in _NORMS:
        if name == "kernel":
            return Decision("ambiguous", f"a kernel in module '{module}'")
        return Decision("auxiliary", f"norm: module '{module}'")
    if name == "kernel":
        return _read_kernel(leaf, tree)
    if tree.in_experts(leaf):
        return _read_experts(leaf, tree)
    if name in ("lora_a", "lora_b"):
        how = "see `orthogonalize_factors`, or train it with `optax.adamw`"
        return Decision("ambiguous", f"a factor of LoRA: {how}")
    return Decision("ambiguous", f"no rule knows a leaf named '{name}'")


def decide(leaves: Sequence[Leaf]) -> list[Decision]:
    """Applies the default rules to every leaf of a tree.

    Args:
      leaves: All leaves of the tree, because leaves are evidence for one another.

    Returns:
      One decision per leaf, in order.
    """
    tree = _Tree(leaves)
    return [_decide(leaf, tree) for leaf in leaves]
