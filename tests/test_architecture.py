"""The package's rules about itself: who imports whom, and what is public."""

import ast
import inspect
import pathlib

import optax
import pytest

import optax_matrix as om

ROOT = pathlib.Path(om.__file__).parent
# Lower may not import higher.
LEVELS = {
    "_check": 0,
    "_mesh": 0,
    "_paths": 0,
    "_table": 0,
    "_linalg": 1,
    "_layout": 2,
    "_placement": 3,
    "_rules": 3,
    "_routing": 4,
    "_transforms": 4,
    "_accounting": 5,
    "diagnostics": 5,
    "_optimizers": 5,
    "__init__": 6,
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """(module, name or None) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def part_of(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


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
def test_only_jax_and_optax_and_nothing_private_of_theirs(path):
    for module, name in imports(path):
        top = module.split(".")[0]
        if top in ("jax", "optax", "numpy"):
            names = [*module.split(".")[1:], name or ""]
            assert not any(n.startswith("_") for n in names), (path, module, name)
        assert top not in ("flax", "chex", "orbax", "equinox", "haiku")


def test_optimizers_hold_no_arithmetic():
    for path in (ROOT / "_optimizers").glob("*.py"):
        assert not any("numpy" in module for module, _ in imports(path)), path


def test_references_import_nothing_of_the_package():
    here = pathlib.Path(__file__).parent / "references"
    for path in here.glob("*.py"):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        assert tops <= {"numpy", "math", "itertools", "collections"}, (path, tops)


def test_all_is_sorted_and_exists():
    assert om.__all__ == sorted(om.__all__, key=lambda n: (not n.isupper(), n))
    for name in om.__all__:
        assert hasattr(om, name)


@pytest.mark.parametrize(
    "name",
    [n for n in om.__all__ if inspect.isfunction(getattr(om, n))]
    + ["diagnostics." + n for n in om.diagnostics.__all__],
)
def test_public_functions_are_documented_and_typed(name):
    function = om
    for part in name.split("."):
        function = getattr(function, part)
    signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    sections = doc.split("Args:")
    if signature.parameters:
        assert len(sections) == 2, "no Args section"
        assert "Returns:" in doc
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Signature.empty, parameter
        assert f"{parameter.name}:" in sections[1], f"{parameter.name} undocumented"


@pytest.mark.parametrize("name", sorted(om.MATRIX_OPTIMIZERS))
def test_optimizers_share_their_last_arguments(name):
    parameters = list(inspect.signature(om.OPTIMIZERS[name]).parameters)
    assert parameters[0] == "learning_rate"
    assert parameters[-3:] == ["routing", "auxiliary", "auxiliary_learning_rate"]


def test_registry_names_the_whole_ladder():
    assert list(om.OPTIMIZERS) == [
        *("sgd", "momentum", "adagrad", "rmsprop", "adam", "adam_l2", "adamw"),
        *("sign_sgd", "lion"),
        *("muon", "muonw", "muonh", "adamh", "adamuon", "normuon", "hopper"),
        *("shampoo", "distributed_shampoo", "soap", "kl_soap", "soap_muon"),
    ]
    assert om.OPTIMIZERS["adamw"] is optax.adamw
