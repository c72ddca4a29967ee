"""The default routing: what Flax's names and shapes say about each leaf.

A rule either recognises a leaf or narrows down how its axes can be read. Where the
readings left are several, or none, the leaf is ambiguous: nothing is guessed.
"""

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from optax_matrix._layout import MatrixLayout


class Leaf(NamedTuple):
    """What the rules see of a leaf."""

    names: tuple[str, ...]  # modules from the outside in, then the leaf's own name
    shape: tuple[int, ...]


class Decision(NamedTuple):
    """What becomes of a leaf, and why."""

    optimizer: Literal["matrix", "auxiliary", "ambiguous"]
    reason: str
    layout: MatrixLayout | None = None


class _Reading(NamedTuple):
    """Axes as (batch..., inputs..., outputs...): how many are batch and outputs."""

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
_ATTENTION_INPUTS = ("query", "key", "value")


@functools.cache
def _tokens(name: str) -> tuple[str, ...]:
    """The words of a name without its number: ``LayerNorm_0`` is layer, norm."""
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
    """Why the leaf's own name makes it auxiliary whatever its shape, if it does."""
    name = leaf.names[-1] if leaf.names else ""
    last = _last(name)
    if len(leaf.shape) < 2:
        return "fewer than 2 axes"
    if last in _VECTORS:
        return f"leaf named '{name}'"
    if last in _EMBEDDINGS or last in _TOKENS or set(_tokens(name)) & _POSITIONS:
        return f"embedding: leaf named '{name}'"
    return None


class _Tree:
    """The leaves with their ancestors, and the evidence that takes siblings."""

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = leaves
        self.below: dict[tuple[str, ...], list[Leaf]] = {}
        for leaf in leaves:
            for depth in range(len(leaf.names)):
                self.below.setdefault(leaf.names[:depth], []).append(leaf)
        self._stacks: dict[tuple[str, ...], int | None] = {}

    def sibling(self, leaf: Leaf, name: str) -> tuple[int, ...] | None:
        """The shape of a leaf in the same module."""
        for other in self.below[leaf.names[:-1]]:
            if other.names == (*leaf.names[:-1], name):
                return other.shape
        return None

    def has_attention(self, leaf: Leaf) -> bool:
        """Whether query, key and value lie beside the leaf's module."""
        beside = leaf.names[:-2]
        return all((*beside, name) in self.below for name in _ATTENTION_INPUTS)

    def expert_batches(self, leaf: Leaf) -> int:
        """How many different leading shapes the module's own 3-D leaves have."""
        depth = len(leaf.names)
        beside = self.below[leaf.names[:-1]]
        shapes = [one.shape for one in beside if len(one.names) == depth]
        return len({shape[:-2] for shape in shapes if len(shape) > 2})

    def matrices_below(self, ancestor: tuple[str, ...]) -> int:
        """How many leaves below are not vectors by name or shape."""
        return sum(_vector_name(leaf) is None for leaf in self.below[ancestor])

    def _stack_below(self, ancestor: tuple[str, ...]) -> int | None:
        """Leading axes all leaves below share, by its norms; None if they disagree."""
        if ancestor in self._stacks:
            return self._stacks[ancestor]
        leaves = self.below[ancestor]
        norms = [
            len(leaf.shape)
            for leaf in leaves
            if _last(leaf.names[-1]) == "scale"
            or (len(leaf.names) > 1 and _last(leaf.names[-2]) in _NORMS)
        ]
        stack = max(min(norms, default=1) - 1, 0)
        if stack and (
            len(leaves) < 2 or len({leaf.shape[:stack] for leaf in leaves}) > 1
        ):
            result = None
        else:
            result = stack
        self._stacks[ancestor] = result
        return result

    def stack(self, leaf: Leaf) -> tuple[int, bool]:
        """Leading stack axes by norms around the leaf, and whether norms object.

        They object where the nearest ones have axes of a stack that does not lead, as
        with `flax.linen.scan(variable_axes={"params": 1})`.
        """
        stacks = [
            self._stack_below(leaf.names[:depth]) for depth in range(len(leaf.names))
        ]
        found = max((stack for stack in stacks if stack), default=0)
        return found, not found and None in stacks


def _all_readings(ndim: int) -> set[_Reading]:
    return {
        _Reading(batch, outputs)
        for batch in range(ndim - 1)
        for outputs in range(1, ndim - batch)
    }


def _named_readings(leaf: Leaf, tree: _Tree) -> tuple[list[_Reading], str]:
    """Readings the module's name allows, the likeliest first; [] if it says nothing."""
    ndim = len(leaf.shape)
    modules = leaf.names[:-1]
    last_two = _Reading(ndim - 2, 1)
    if any(_EXPERTS & set(_tokens(name)) for name in modules):
        return [last_two], "expert stack"
    module = modules[-1] if modules else ""
    if module in _ATTENTION_INPUTS and tree.has_attention(leaf):
        return [_Reading(ndim - 3, 2), last_two], "attention projection"
    if module == "out" and tree.has_attention(leaf):
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
    """Readings whose (batch..., outputs...) is the bias's shape."""
    return {
        reading
        for reading in readings
        if kernel[: reading.batch] + kernel[-reading.outputs :] == bias
    }


def _as_layout(reading: _Reading, ndim: int) -> MatrixLayout:
    def side(start: int, stop: int) -> int | tuple[int, ...]:
        axes = tuple(range(start - ndim, stop - ndim))
        return start - ndim if len(axes) == 1 else axes

    middle = ndim - reading.outputs
    return MatrixLayout(side(reading.batch, middle), side(middle, ndim))


def _read_kernel(leaf: Leaf, tree: _Tree) -> Decision:
    """Reads a Flax kernel, (batch..., inputs..., outputs...)."""
    ndim = len(leaf.shape)
    stack, objection = tree.stack(leaf)
    if ndim == 2:
        if stack:
            return Decision(
                "ambiguous", "contradictory: its norms say axis 0 is a stack"
            )
        return Decision("matrix", "kernel", MatrixLayout())

    readings = _all_readings(ndim)
    evidence = []
    named, kind = _named_readings(leaf, tree)
    if named:
        readings &= set(named)
        evidence.append(f"module '{leaf.names[-2]}' ({kind})")
    bias = tree.sibling(leaf, "bias")
    if bias is not None:
        readings = _bias_readings(leaf.shape, bias, readings)
        evidence.append(f"bias {bias}")
    if stack:
        readings = {reading for reading in readings if reading.batch >= stack}
        evidence.append(f"norms stacked {leaf.shape[:stack]}")
        exact = {reading for reading in readings if reading.batch == stack}
        readings = exact or readings
    if not evidence:
        return Decision("ambiguous", "no name, bias or norm says how to read its axes")
    told = ", ".join(evidence)
    if not readings:
        return Decision("ambiguous", f"contradictory: {told}")
    if len(readings) > 1 and named and bias is None:
        readings = {next(reading for reading in named if reading in readings)}
    if len(readings) > 1:
        return Decision("ambiguous", f"several readings fit: {told}")
    (reading,) = readings
    if objection and bias is None and kind != "expert stack":
        return Decision("ambiguous", f"norms stacked, but not on axis 0; {told}")
    return Decision("matrix", f"kernel: {told}", _as_layout(reading, ndim))


def _decide(leaf: Leaf, tree: _Tree) -> Decision:
    vector = _vector_name(leaf)
    if vector is not None:
        return Decision("auxiliary", vector)
    name, modules = (leaf.names[-1], leaf.names[:-1]) if leaf.names else ("", ())
    module = modules[-1] if modules else ""

    for depth, ancestor in enumerate(modules, start=1):
        for kind, matches in (("output head", _is_head), ("embedding", _is_embedding)):
            if matches(ancestor) and tree.matrices_below(modules[:depth]) == 1:
                return Decision("auxiliary", f"{kind}: module '{ancestor}'")
    for ancestor in modules:
        if _is_head(ancestor) or _is_embedding(ancestor):
            return Decision(
                "ambiguous", f"one of several matrices in module '{ancestor}'"
            )
    if _last(module) == "router" or _last(name) == "router":
        return Decision("auxiliary", "router")
    if _last(module) in _NORMS:
        if name == "kernel":
            return Decision("ambiguous", f"a kernel in module '{module}'")
        return Decision("auxiliary", f"norm: module '{module}'")
    if name == "kernel":
        return _read_kernel(leaf, tree)
    if (
        len(leaf.shape) >= 3
        and any(_EXPERTS & set(_tokens(ancestor)) for ancestor in modules)
        and _tokens(name)
        and set(_tokens(name)) <= _EXPERT_LEAVES
    ):
        if tree.expert_batches(leaf) > 1:
            return Decision("ambiguous", "expert stacks of different batch axes")
        return Decision("matrix", f"expert stack: leaf named '{name}'", MatrixLayout())
    return Decision("ambiguous", f"no rule knows a leaf named '{name}'")


def decide(leaves: Sequence[Leaf]) -> list[Decision]:
    """Decides every leaf of a tree by the default rules.

    Args:
      leaves: All leaves of the tree: siblings are evidence.

    Returns:
      One decision per leaf, in order.
    """
    tree = _Tree(leaves)
    return [_decide(leaf, tree) for leaf in leaves]
