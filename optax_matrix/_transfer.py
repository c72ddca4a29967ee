"""Learning rates for a large model from those that were tuned for a small one."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_matrix import _check, _layout, _paths, _routing
from optax_matrix._transforms import _arguments

Unit = Literal["entrywise", "orthogonal", "spectral", "mup", "rms", "relative"]


def width_factors(
    params: Any,
    base: Any,
    unit: Unit,
    *,
    routing: _routing.Routing = None,
    readouts: Callable[[str], bool] | None = None,
) -> Any:
    r"""Returns the factor of each leaf's learning rate that transfers it over width.

    By the spectral condition, steps :math:`\Delta W` of a matrix of :math:`m` inputs
    and :math:`n` outputs should have spectral norms in proportion to
    :math:`\sqrt{n/m}`, so that features change as much in models of all widths (μP).
    With the norm :math:`s(m, n)` that a step has at a learning rate of 1, the factor is

    .. math::
      f = \frac{\sqrt{n/m}}{s(m, n)} \Big/
      \frac{\sqrt{n_0/m_0}}{s(m_0, n_0)},

    where :math:`m_0` and :math:`n_0` are those of the base model:

    ================  ==========================  =================================
    ``unit``          :math:`s(m, n)`             optimizers
    ================  ==========================  =================================
    ``"entrywise"``   :math:`\sqrt{mn}`           AdamW, Lion: :math:`f = m_0/m`
    ``"orthogonal"``  1                           ``shape_scale=None``
    ``"spectral"``    :math:`\sqrt{\max(1,n/m)}`  `muon`, `muonw`, `normuon`
    ``"mup"``         :math:`\sqrt{n/m}`          ``shape_scale="mup"``: :math:`f=1`
    ``"rms"``         :math:`\sqrt{\max(m,n)}`    `adamuon`, `hopper`, `halley_muon`
    ``"relative"``    :math:`\sqrt{n/m}`          `muonh`, `spectral_sphere`
    ================  ==========================  =================================

    All other leaves are assumed to be trained by AdamW: the factor of a readout (the
    output head, a router) is :math:`m_0/m`, and that of embeddings, gains and biases 1.
    Initial values and the multipliers of a model are its own affair: μP wants hidden
    matrices with a variance of :math:`1/m` and a readout near zero.

    Args:
      params: The parameters of the model to train, or their shapes.
      base: The parameters of the model whose learning rate was tuned, or their shapes:
        the same model with another width, as `jax.eval_shape` returns them.
      unit: What a learning rate of 1 means for the matrices, see above.
      routing: Which leaves are matrices, see `route`.
      readouts: Which other leaves are readouts, given the path. None: those named
        ``kernel``, as in Flax.

    Returns:
      A tree like ``params`` of Python floats, for `with_learning_rate_factors`.

    Raises:
      ValueError: If ``base`` has other leaves or another number of axes, with the path;
        for an unknown ``unit``; if the parts of a fused leaf need different factors; if
        an auxiliary leaf with several axes grows and neither its name nor ``readouts``
        says whether it is a readout.

    References:
      Yang et al., 2022, `arXiv:2203.03466 <https://arxiv.org/abs/2203.03466>`_; Yang et
      al., 2023, `arXiv:2310.17813 <https://arxiv.org/abs/2310.17813>`_.

    Example:
      >>> base = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((512, 2048), "float32")}}
      >>> width_factors(params, base, "entrywise")["up"]["kernel"]
      0.125
    """
    _check.one_of("unit", unit, get_args(Unit))
    if readouts is not None and not callable(readouts):
        raise TypeError(
            f"`readouts` must be a function of the path, or None, got {readouts!r}."
        )
    matches = _paths.match(base, params, "base", lambda _: False)
    treedef = jax.tree.structure(params)
    layouts = treedef.flatten_up_to(_routing.route(params, routing))
    factors = []
    for (place, small, _), layout in zip(matches, layouts, strict=True):
        path, shape, before = place.name, np.shape(place.leaf), np.shape(small)
        if len(shape) != len(before):
            raise _another(path, shape, before)
        if isinstance(layout, str):
            factors.append(_auxiliary(path, shape, before, readouts))
        else:
            factors.append(_matrix(path, shape, before, layout, unit))
    return treedef.unflatten(factors)


Shape = tuple[int, ...]


def _another(path: str, shape: Shape, base: Shape) -> ValueError:
    return ValueError(
        "`base` must be the same model with another width, for depth see "
        f"`hyperp_factor`; got the shape {base} at '{path}', which has {shape} in "
        "`params`."
    )


def _matrix(
    path: str, shape: Shape, before: Shape, layout: _layout.MatrixLayout, unit: Unit
) -> float:
    """Returns the factor of a leaf that the matrix optimizer takes."""
    view, base = (_layout.view(each, layout, path) for each in (shape, before))
    if view.count != base.count:
        raise _another(path, shape, before)

    def wanted(view: _layout.MatrixView) -> np.ndarray:
        """What the learning rate must be in proportion to."""
        m, n = np.broadcast_arrays(view.fan_in(), view.fan_out())
        length = {
            "entrywise": np.sqrt(m * n),
            "orthogonal": np.ones_like(m),
            "spectral": np.sqrt(np.maximum(1, n / m)),
            "rms": np.sqrt(np.maximum(m, n)),
        }.get(unit, np.sqrt(n / m))
        return np.sqrt(n / m) / length

    factors = np.unique((wanted(view) / wanted(base)).round(12))
    if len(factors) > 1:
        raise ValueError(
            f"`base` must give one factor to each leaf, got {factors.tolist()} for the "
            f"blocks of '{path}', {view.matrices} from {base.matrices}. Store them as "
            "separate leaves, or widen all in proportion."
        )
    return float(factors[0])


def _auxiliary(
    path: str, shape: Shape, base: Shape, readouts: Callable[[str], bool] | None
) -> float:
    """Returns the factor of a leaf that AdamW takes."""
    grown = [(m, m0) for m, m0 in zip(shape, base, strict=True) if m != m0]
    if not grown or len(shape) < 2:
        return 1.0
    name = path.rpartition("/")[2]
    if readouts is not None:
        is_readout = readouts(path)
    elif name in ("kernel", "embedding", "bias", "scale"):
        is_readout = name == "kernel"
    else:
        raise ValueError(
            f"`readouts` must say whether '{path}' is a readout, as an output head is, "
            f"because the shape {shape}, from {base}, and the name do not."
        )
    if not is_readout:
        return 1.0
    if len(grown) > 1:
        raise _another(path, shape, base)
    ((m, m0),) = grown
    return m0 / m


def hyperp_factor(*, layers: ArrayLike = 1.0, tokens: ArrayLike = 1.0) -> Any:
    r"""Returns the factor of a learning rate that transfers it over depth and tokens.

    .. math:: f = (L/L_0)^{-1/2} \, (T/T_0)^{-0.32}.

    HyperP is this factor with steps of a length relative to the weights (`muonh`,
    `adamh`), which transfer over width as they are, in a model whose residual branches
    are scaled by :math:`1/\sqrt{2L}`. On spheres, initial values of the branches' last
    matrices that are smaller by that factor have the same effect.

    Args:
      layers: :math:`L/L_0`, the number of layers over that of the base model, positive.
      tokens: :math:`T/T_0`, the training tokens over those of the base model, positive.

    Returns:
      A number, by which all learning rates are multiplied.

    Raises:
      ValueError: If a number is not positive.

    References:
      Ren et al., 2026, `arXiv:2603.28743 <https://arxiv.org/abs/2603.28743>`_.

    Example:
      >>> f"{hyperp_factor(layers=4, tokens=10):.3f}"
      '0.239'
    """
    _arguments.number("layers", layers, 0.0, low_open=True)
    _arguments.number("tokens", tokens, 0.0, low_open=True)
    return layers**-0.5 * tokens**-0.32


def with_learning_rate_factors(
    optimizer: Callable[[float], optax.GradientTransformation], factors: Any
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the learning rate of each leaf by a factor.

    The optimizer is built once for each distinct factor, and trains the leaves that
    have it. So the factor is that of the learning rate, also where updates are not in
    proportion to it, and decoupled weight decay is multiplied with it.

    Args:
      optimizer: Returns the optimizer at a given multiple of its learning rate, such as
        ``lambda factor: om.muon(0.02 * factor)``. It is an optimizer of all leaves
        that sees some of them masked, so rules that need other leaves as evidence do
        not apply: pass ``routing=om.route(params)`` in it.
      factors: A tree of positive numbers, or a prefix of one, by the names of leaves:
        what `width_factors` returns.

    Returns:
      A transformation with the state of `optax.partition`, whose keys are the factors.

    Raises:
      ValueError: At construction, for a factor that is not positive, with its path; at
        ``init``, if ``factors`` does not match the parameters.
      TypeError: At construction, if ``optimizer`` is not a function or does not return
        a transformation.

    Example:
      >>> import optax_matrix as om
      >>> factors = {"body": 1.0, "head": 0.125}
      >>> tx = with_learning_rate_factors(lambda f: optax.adam(1e-3 * f), factors)
    """
    if not callable(optimizer):
        raise TypeError(
            "`optimizer` must be a function of the factor that returns an optimizer, "
            f"got {optimizer!r}."
        )
    for path, factor in jax.tree_util.tree_leaves_with_path(factors):
        where = f"factors['{_paths.path_name(path)}']"
        _arguments.number(where, factor, 0.0, low_open=True)
    distinct = sorted({float(factor) for factor in jax.tree.leaves(factors)})
    transforms: dict[Hashable, optax.GradientTransformation] = {
        str(factor): optimizer(factor) for factor in distinct
    }
    for built in transforms.values():
        _arguments.transformation("optimizer", built)

    def labels(tree: Any) -> Any:
        matches = _paths.match(factors, tree, "factors", lambda _: False)
        names = [str(float(match.entry)) for match in matches]
        return jax.tree.unflatten(jax.tree.structure(tree), names)

    return optax.partition(transforms, labels)
