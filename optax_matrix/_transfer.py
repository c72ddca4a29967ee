"""Learning rates for a large model from those that were tuned for a small one."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.core
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _paths, _routing, _rules
from optax_matrix._layout import MatrixLayout

Unit = Literal["entrywise", "orthogonal", "spectral", "mup", "rms"]
# What the learning rate of an m×n matrix must be in proportion to: √(n/m) over the
# spectral norm of a step at a learning rate of 1.
RULES: Mapping[Unit, Callable[[Any, Any], Any]] = {
    "entrywise": lambda m, n: 1 / m,
    "orthogonal": lambda m, n: np.sqrt(n / m),
    "spectral": lambda m, n: np.sqrt(np.minimum(1, n / m)),
    "mup": lambda m, n: 1.0,
    "rms": lambda m, n: np.sqrt(n / m / np.maximum(m, n)),
}
Readouts = Callable[[str, Any], MatrixLayout | bool | None]


def width_factors(
    params: Any,
    base: Any,
    unit: Unit,
    *,
    routing: _routing.Routing = None,
    readouts: Readouts | None = None,
) -> Any:
    r"""Returns factors that transfer each leaf's learning rate over width.

    By the spectral condition, steps :math:`\Delta W` of a matrix of :math:`m` inputs
    and :math:`n` outputs should have spectral norms in proportion to
    :math:`\sqrt{n/m}`, so that features change as much in models of all widths (μP).
    With the norm :math:`s(m, n)` that a step has at a learning rate of 1, the factor is

    .. math::
      f = \frac{\sqrt{n/m}}{s(m, n)} \Big/
      \frac{\sqrt{n_0/m_0}}{s(m_0, n_0)},

    where :math:`m_0` and :math:`n_0` are those of the base model:

    ================  ==========================  ======================================
    ``unit``          :math:`s(m, n)`             optimizers
    ================  ==========================  ======================================
    ``"entrywise"``   :math:`\sqrt{mn}`           AdamW, Lion: :math:`f = m_0/m`
    ``"orthogonal"``  1                           those with ``shape_scale=None``
    ``"spectral"``    :math:`\sqrt{\max(1,n/m)}`  ``shape_scale="spectral"``: `muon`,
                                                  `muonw`, `normuon`; and `muonh`
    ``"mup"``         :math:`\sqrt{n/m}`          ``shape_scale="mup"``: :math:`f = 1`;
                                                  and `spectral_sphere`
    ``"rms"``         :math:`\sqrt{\max(m,n)}`    ``shape_scale="rms"``: `adamuon`;
                                                  and `hopper`, `halley_muon`
    ================  ==========================  ======================================

    Matrices of which all sizes grow alike have the factor 1 with ``"spectral"``. For
    `muonh`, whose steps are relative to the weights, their initial variance must be in
    proportion to :math:`1/m`, and the rank of its updates in proportion to the width.

    All other leaves are assumed to be trained by AdamW. The factor of readouts (the
    output head, routers) is :math:`m_0/m`, and that of embeddings, gains and biases 1.
    Nothing else of a model is changed: μP also requires hidden matrices with an initial
    variance in proportion to :math:`1/m` and a readout near zero, a factor of
    :math:`m_0/m` for logits of a tied embedding, and attention logits in proportion to
    1/head_dim if that grows.

    Args:
      params: The parameters of the model to train, or their shapes.
      base: The parameters of the model whose learning rate was tuned, or their shapes
        (`jax.eval_shape` returns them): the same leaves at another width.
      unit: What a learning rate of 1 means for the matrices, see above.
      routing: Which leaves are matrices, see `route`. A function is called with the
        leaves of both models.
      readouts: Which other leaves are readouts: a function of (path, leaf) that returns
        True (the last two axes are inputs and outputs), a `MatrixLayout`, False, or
        None (apply the default rules to this leaf). None: the rules of `route` know
        heads and routers that are Flax kernels.

    Returns:
      A tree like ``params`` of Python floats, for `with_learning_rate_factors`.

    Raises:
      ValueError: If ``base`` does not have the same leaves, with the path; for an
        unknown ``unit``; if the blocks of a fused leaf need different factors; if it is
        unknown whether or how an auxiliary leaf is a readout.

    References:
      Yang et al., 2022, `arXiv:2203.03466 <https://arxiv.org/abs/2203.03466>`_; Yang et
      al., 2023, `arXiv:2310.17813 <https://arxiv.org/abs/2310.17813>`_.

    Example:
      >>> base = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((512, 2048), "float32")}}
      >>> width_factors(params, base, "entrywise")["up"]["kernel"]
      0.125
    """
    _check.one_of("unit", unit, tuple(RULES))
    if readouts is not None:
        _check.function("readouts", readouts, "the path and the leaf")
    layouts, small = _layouts(params, routing), _layouts(base, routing)
    factors = []
    for rule, (place, other, prefix) in zip(
        _routing.by_rules(params),
        _paths.match(base, params, "base", lambda _: False),
        strict=True,
    ):
        path, leaf = place.name, place.leaf
        if prefix or np.ndim(leaf) != np.ndim(other):
            raise ValueError(
                "`base` must be the same model at another width, got "
                f"{'None' if other is None else np.shape(other)} for '{path}', whose "
                f"shape is {np.shape(leaf)}."
            )
        layout, layout_of_base, of_leaf = layouts[path], small[path], unit
        if isinstance(layout, str):
            of_leaf = "entrywise"
            layout = layout_of_base = _readout(path, leaf, other, rule, readouts)
        if layout is None:
            factors.append(1.0)
            continue
        if isinstance(layout_of_base, str):
            raise ValueError(
                f"`base` must be routed as `params`, in which '{path}' is a matrix and "
                f"in `base`, where its shape is {np.shape(other)}, it is not."
            )
        view = _layout.view(np.shape(leaf), layout, path)
        view_of_base = _layout.view(np.shape(other), layout_of_base, path)
        factors.append(_factor(of_leaf, view, view_of_base))
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def _layouts(tree: Any, routing: _routing.Routing) -> dict[str, Any]:
    """Returns by path the layout of each leaf, or "auxiliary"."""
    leaves = jax.tree.leaves(_routing.route(tree, routing))
    places = [place for place in _paths.places(tree) if not place.empty]
    return {place.name: leaf for place, leaf in zip(places, leaves, strict=True)}


def _readout(
    path: str, leaf: Any, base: Any, rule: _rules.Decision, readouts: Readouts | None
) -> MatrixLayout | None:
    """Returns how an auxiliary leaf is read as a readout, or None if it is none."""
    told = readouts(path, leaf) if readouts else None
    if isinstance(told, MatrixLayout):
        return told
    if told is not None:
        _check.boolean("readouts", told)
        return MatrixLayout() if told else None
    if rule.optimizer == "auxiliary" and rule.readout is None:
        return None
    # Routing can give to AdamW what the rules know as a hidden matrix.
    layout = rule.layout or rule.readout
    if isinstance(layout, MatrixLayout):
        return layout
    if np.shape(leaf) == np.shape(base):
        return None
    raise ValueError(
        f"`readouts` must say whether '{path}' is a readout, as an output head is, and "
        "which of its axes are inputs, because the rules do not know; its shape is "
        f"{np.shape(leaf)}, from {np.shape(base)}. Pass a function, for example "
        "readouts=lambda path, leaf: om.MatrixLayout(inputs=-1, outputs=-2) if path == "
        f"{path!r} else None"
    )


def _factor(unit: Unit, view: _layout.MatrixView, base: _layout.MatrixView) -> float:
    """Returns the factor of a leaf, to 12 digits so that equal ones are equal."""
    found = [RULES[unit](v.fan_in(), v.fan_out()) for v in (view, base)]
    if np.shape(found[0]) != np.shape(found[1]):
        raise ValueError(
            f"`base` must have as many blocks as `params`, got {base.matrices} for "
            f"{view.matrices} at '{view.path}'."
        )
    factors = {float(f"{factor:.12g}") for factor in np.ravel(found[0] / found[1])}
    if len(factors) > 1:
        raise ValueError(
            f"`base` must give one factor to each leaf, got {sorted(factors)} for the "
            f"blocks of '{view.path}', {view.matrices} from {base.matrices}. Store "
            "them as separate leaves, or widen all in proportion."
        )
    return factors.pop()


def hyperp_factor(*, depth_ratio: ArrayLike = 1.0, token_ratio: ArrayLike = 1.0) -> Any:
    r"""Returns the factor of learning rates that transfers them over depth and tokens.

    .. math:: f = (L/L_0)^{-1/2} \, (T/T_0)^{-0.32}.

    This is HyperP at a fixed batch size. There all learning rates have this factor,
    matrices take steps of a length relative to their norm (`muonh`), which need no
    factor for width, and residual branches are scaled by :math:`1/\sqrt{2L}`. On
    spheres, initial values of the last matrices of the branches that are smaller by
    that factor have the same effect.

    Args:
      depth_ratio: :math:`L/L_0`, the number of layers over that of the base model,
        positive.
      token_ratio: :math:`T/T_0`, the training tokens over those of the base model,
        positive.

    Returns:
      A number, by which all learning rates are multiplied.

    Raises:
      ValueError: If a number is not positive.
      TypeError: If an argument is not a number.

    References:
      Ren et al., 2026, `arXiv:2603.28743 <https://arxiv.org/abs/2603.28743>`_.

    Example:
      >>> f"{hyperp_factor(depth_ratio=4, token_ratio=10):.3f}"
      '0.239'
    """
    _check.number("depth_ratio", depth_ratio, 0.0, low_open=True)
    _check.number("token_ratio", token_ratio, 0.0, low_open=True)
    return depth_ratio**-0.5 * token_ratio**-0.32


def with_learning_rate_factors(
    optimizer: Callable[[float], optax.GradientTransformation], factors: Any
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the learning rate of each leaf by a factor.

    The optimizer is built once for each distinct factor, and trains the leaves that
    have it; each of these groups has its own stacks and exchanges. So the factor is
    that of the learning rate, also where updates are not in proportion to it.
    Transformations that combine leaves, such as `optax.clip_by_global_norm` and
    `optax.apply_if_finite`, would see one group at a time: put them around this one.

    Args:
      optimizer: Returns the optimizer with every learning rate multiplied by a number,
        an ``auxiliary_learning_rate`` too. It gets some of the leaves, and routes them
        as in the whole tree. Decoupled weight decay is multiplied by the learning rate;
        divide ``weight_decay`` by the number to keep their product.
      factors: A tree of positive numbers, or a prefix of one, by the names of leaves:
        what `width_factors` returns. They fix the program.

    Returns:
      A transformation with the state of `optax.partition`, whose keys are the factors.

    Raises:
      ValueError: At construction, for a factor that is not positive, with its path; at
        ``init``, if ``factors`` does not match the parameters.
      TypeError: At construction, if ``optimizer`` is not a function or does not return
        a transformation, or if a factor is not a number.

    Example:
      >>> import optax_matrix as om
      >>> params = {"up": {"kernel": jax.numpy.ones((8, 8))}, "norm": jax.numpy.ones(8)}
      >>> factors = {"up": 1.0, "norm": 0.5}
      >>> tx = with_learning_rate_factors(lambda f: om.muon(0.02 * f), factors)
    """
    _check.function("optimizer", optimizer, "the factor that returns an optimizer")
    for path, factor in jax.tree_util.tree_leaves_with_path(factors):
        where = f"factors['{_paths.path_name(path)}']"
        if isinstance(factor, jax.core.Tracer):
            raise TypeError(f"`{where}` fixes the program, got a traced number.")
        _check.number(where, factor, 0.0, low_open=True)
    transforms: dict[Hashable, optax.GradientTransformation] = {}
    for factor in sorted({float(factor) for factor in jax.tree.leaves(factors)}):
        transforms[str(factor)] = built = optimizer(factor)
        if not isinstance(built, optax.GradientTransformation):
            raise TypeError(
                "`optimizer` must return an optax.GradientTransformation, got "
                f"{built!r}."
            )

    def delegate(tree: Any) -> optax.GradientTransformationExtraArgs:
        names = []
        for place, factor, _ in _paths.match(factors, tree, "factors", lambda _: False):
            if factor is None:
                raise ValueError(
                    f"`factors` must have a number, got None at '{place.name}'."
                )
            names.append(str(float(factor)))
        labels = jax.tree.unflatten(jax.tree.structure(tree), names)
        return optax.partition(transforms, lambda _: labels)

    def init(params: optax.Params) -> optax.OptState:
        with _routing.evidence(params):
            return delegate(params).init(params)

    def update(updates, state, params=None, **extra_args):
        with _routing.evidence(updates):
            return delegate(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
