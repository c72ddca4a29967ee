"""The package's rules about itself: who imports whom, and what is public."""

import ast
import dataclasses
import inspect
import pathlib
import re
import sys
import tomllib

import chex
import optax
import pytest

import optax_matrix as om
from optax_matrix._optimizers import _routed
from tests import problems

ROOT = pathlib.Path(om.__file__).parent
# Lower may not import higher.
LEVELS = {
    "_check": 0,
    "_mesh": 0,
    "_paths": 0,
    "_table": 0,
    "_coordinates": 1,
    "_linalg": 1,
    "_presets": 1,
    "_clipping": 3,
    "_curvature": 3,
    "_evaluation": 1,
    "_layout": 2,
    "_placement": 3,
    "_rules": 3,
    "_routing": 4,
    "_transforms": 4,
    "_accounting": 5,
    "_transfer": 5,
    "diagnostics": 5,
    "_optimizers": 5,
    "__init__": 6,
}
DEPENDENCIES = {"jax", "numpy", "optax", "scipy"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """(module, name or None) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def part_of(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def test_every_part_has_a_level():
    assert {part_of(path) for path in FILES} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    level = LEVELS[part_of(path)]
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] != "optax_matrix":
            continue
        target = parts[1] if len(parts) > 1 else name
        if target in LEVELS and target != part_of(path):
            assert LEVELS[target] < level, f"{path} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_dependencies_are_imported_and_nothing_private_of_theirs(path):
    for module, name in imports(path):
        top = module.split(".")[0]
        if top in DEPENDENCIES:
            names = [*module.split(".")[1:], name or ""]
            assert not any(n.startswith("_") for n in names), (path, module, name)
        else:
            assert top in {"optax_matrix", *sys.stdlib_module_names}, (path, module)


def test_the_dependencies_are_declared():
    text = (ROOT.parent / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["dependencies"]
    assert {requirement.split(">=")[0] for requirement in declared} == DEPENDENCIES


def test_optimizers_hold_no_arithmetic():
    for path in (ROOT / "_optimizers").glob("*.py"):
        assert not any("numpy" in module for module, _ in imports(path)), path


def test_references_import_nothing_of_the_package():
    here = pathlib.Path(__file__).parent / "references"
    for path in here.glob("*.py"):
        modules = [m for m, _ in imports(path) if not m.startswith("tests.references")]
        tops = {module.split(".")[0] for module in modules}
        assert tops <= {"numpy", "math", "itertools", "collections"}, (path, tops)


def test_all_is_sorted_and_exists():
    assert om.__all__ == sorted(om.__all__, key=lambda n: (not n.isupper(), n))
    for name in om.__all__:
        assert hasattr(om, name)


FUNCTIONS = [n for n in om.__all__ if inspect.isfunction(getattr(om, n))]
CLASSES = [n for n in om.__all__ if inspect.isclass(getattr(om, n))]
DIAGNOSTICS = {n: getattr(om.diagnostics, n) for n in om.diagnostics.__all__}
# Functions with other defaults than another one, which documents their arguments.
PRESETS = {
    "muonw": "muon",
    "muon_nsr": "muon_vs",
    "distributed_shampoo": "shampoo",
    "kl_soap": "soap",
    "kl_soap_precondition": "soap_precondition",
}


def documented(doc, heading):
    """The names under a heading of a docstring, in order."""
    _, _, rest = doc.partition(f"\n{heading}:\n")
    section, _, _ = rest.partition("\n\n")
    return re.findall(r"^  [*]*(\w+): \S", section, re.MULTILINE)


@pytest.mark.parametrize(
    "name",
    FUNCTIONS
    + [f"diagnostics.{n}" for n, x in DIAGNOSTICS.items() if inspect.isfunction(x)],
)
def test_public_functions_are_documented_and_typed(name):
    function = om
    for part in name.split("."):
        function = getattr(function, part)
    signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    assert "\nReturns:\n" in doc
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Signature.empty, parameter
    if name in PRESETS:
        factory = PRESETS[name]
        assert factory in FUNCTIONS and factory not in PRESETS
        assert list(signature.parameters) == list(
            inspect.signature(getattr(om, factory)).parameters
        )
        first = next(iter(signature.parameters))
        assert f"  {first}: As every other argument, see `{factory}`.\n" in doc
    else:
        assert documented(doc, "Args") == list(signature.parameters)


@pytest.mark.parametrize("name", [*CLASSES, "CoordinateCheck"])
def test_public_classes_are_documented_and_typed(name):
    cls = DIAGNOSTICS.get(name) or getattr(om, name)
    doc = inspect.getdoc(cls) or ""
    assert doc
    if dataclasses.is_dataclass(cls):
        known = documented(doc, "Args") + documented(doc, "Attributes")
        assert sorted(known) == sorted(f.name for f in dataclasses.fields(cls))
    for member, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else value
        if not member.startswith("_") and inspect.isfunction(function):
            assert inspect.getdoc(function), member
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, member


# `momentum`, `b2`, `mu_dtype` and `orthogonalize` are the words for these; what a stage
# scales to has the name of the quantity.
OTHER_WORDS = {
    *("b1", "beta1", "decay", "accumulator_dtype", "moment_dtype"),
    *("ns_steps", "target", "rule"),
}


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_one_concept_has_one_name(name):
    assert not OTHER_WORDS & set(inspect.signature(getattr(om, name)).parameters)


TAIL = [
    *("weight_decay", "weight_decay_mask", "mu_dtype", "routing", "placement"),
    *("auxiliary", "auxiliary_learning_rate"),
]


@pytest.mark.parametrize("name", sorted(om.MATRIX_OPTIMIZERS))
def test_optimizers_share_their_last_arguments(name):
    def tail(factory):
        return list(inspect.signature(factory).parameters.values())[-len(TAIL) :]

    first, *rest = inspect.signature(om.OPTIMIZERS[name]).parameters
    assert first == "learning_rate" and rest[-len(TAIL) :] == TAIL
    got = tail(om.OPTIMIZERS[name])
    assert isinstance(got[0].default, float)
    # Kinds, annotations and defaults are equal too.
    assert [got[0].replace(default=0.0), *got[1:]] == tail(om.muon)
    assert all(parameter.default is None for parameter in got[1:])


@pytest.mark.parametrize("indent", ["    ", ""])  # Python 3.13 removes it
def test_common_arguments_are_filled_in(indent):
    def factory():
        pass

    lines = ["Args:", "  first: One.", "  <common arguments>", "", "Returns:"]
    factory.__doc__ = f"\n{indent}".join(["Summary.", "", *lines])
    doc = inspect.getdoc(_routed.documented("2")(factory)) or ""
    assert documented(doc, "Args") == ["first", *TAIL]
    assert "``learning_rate`` times 2.\n\nReturns:" in doc


def stages(chain):
    """The names of the stages of an `optax.chain(...)`, as users write them."""
    assert isinstance(chain, ast.Call) and ast.unparse(chain.func) == "optax.chain"
    assert all(isinstance(stage, ast.Call) for stage in chain.args)
    public = {"_transforms.": "om.", "_routed.decayed": "optax.add_decayed_weights"}
    names = [ast.unparse(stage.func) for stage in chain.args]
    for private, name in public.items():
        names = [stage.replace(private, name) for stage in names]
    return names


def test_the_readme_writes_out_the_body_of_muon():
    text = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (written,) = (
        node
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "muon"
    )
    factory = ast.parse(inspect.getsource(om.muon))
    (body,) = (
        node.body[-1].value
        for node in ast.walk(factory)
        if isinstance(node, ast.FunctionDef) and node.name == "matrix"
    )
    assert stages(written.value) == stages(body)
    muon = eval(ast.unparse(written.value), {"om": om, "optax": optax})
    grads = [problems.matrices_only(seed=t) for t in range(3)]
    params = problems.matrices_only(seed=3)
    got, _ = problems.unroll(muon, grads, params)
    want, _ = problems.unroll(om.muon(0.02, routing="matrix"), grads, params)
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-8)


def test_registry_names_the_whole_ladder():
    assert list(om.OPTIMIZERS) == [
        *("sgd", "momentum", "adagrad", "rmsprop", "adam", "adam_l2", "adamw"),
        *("sign_sgd", "lion"),
        *("muon", "muonw", "muonh", "adamh", "adamuon", "normuon"),
        *("dion", "muown", "hopper", "halley_muon"),
        *("muon_vs", "muon_nsr", "muon_squared", "mano"),
        *("shampoo", "distributed_shampoo", "soap", "kl_soap", "soap_muon"),
        *("nanochat_muon", "track3", "spectral_sphere", "spel"),
    ]
    assert om.OPTIMIZERS["adamw"] is optax.adamw
