"""What `benchmarks.hlo` counts in programs whose work is known by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo

X = jax.ShapeDtypeStruct((32, 64), jnp.float32)
FLAG = jax.ShapeDtypeStruct((), jnp.bool_)
GRAM = 2 * 32 * 32 * 64


def compiled(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(function).lower(*args).compile()


def text_of(function: Callable[..., Any], *args: Any) -> str:
    text = compiled(function, *args).as_text()
    assert text is not None
    return text


def gram(x: jax.Array) -> jax.Array:
    return x @ jnp.swapaxes(x, -1, -2)


def repeat(
    step: Callable[[jax.Array], jax.Array], times: int
) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.scan(lambda c, _: (step(c), None), x, None, length=times)[0]


def program(*lines: str, header: str = "HloModule m, num_partitions=8") -> str:
    """An entry that holds these lines, after a parameter `%p` of 4 KiB."""
    body = ["%p = f32[32,32]{1,0} parameter(0)", *lines]
    inside = "\n".join(f"  {line}" for line in body)
    return f"{header}\n\nENTRY %main (p: f32[32,32]) -> f32[32,32] {{\n{inside}\n}}\n"


@pytest.mark.parametrize(
    ("function", "shape", "flops"),
    [
        (gram, (32, 64), GRAM),
        (lambda x: x.T @ x, (32, 64), 2 * 64 * 64 * 32),
        (gram, (3, 32, 64), 3 * GRAM),
        (gram, (2, 3, 32, 64), 6 * GRAM),
        (lambda x: jnp.einsum("abc,dbc->ad", x, x), (8, 3, 5), 2 * 8 * 8 * 15),
        (lambda x: x @ x[0], (32, 64), 2 * 32 * 64),
        (repeat(lambda x: gram(x) @ x, 5), (32, 64), 5 * 2 * GRAM),
        (repeat(repeat(lambda x: x @ x, 3), 4), (32, 32), 12 * 2 * 32**3),
        (lambda x: lax.fori_loop(2, 9, lambda i, c: c @ c, x), (8, 8), 7 * 2 * 8**3),
        (lambda x: lax.map(gram, x), (6, 32, 64), 6 * GRAM),
        (lambda x: jax.jit(jax.jit(gram))(x) + 1, (32, 64), GRAM),
        (lambda x: jnp.tanh(gram(jnp.sin(x))) + 1, (32, 64), GRAM),
        (lambda x: x + 1, (32, 64), 0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_flops(function: Callable[..., Any], shape: Any, flops: int, dtype: Any):
    assert hlo.dot_flops(text_of(function, jax.ShapeDtypeStruct(shape, dtype))) == flops


def test_a_loop_is_counted_once_by_jax_and_every_time_here():
    program = compiled(repeat(lambda x: x @ x, 5), jax.ShapeDtypeStruct((32, 32), "f4"))
    analysis, once = program.cost_analysis(), 2 * 32**3
    assert isinstance(analysis, dict)
    assert once <= analysis["flops"] < 2 * once
    assert hlo.dot_flops(program.as_text() or "") == 5 * once


def test_the_costliest_branch_counts():
    def one(pred: jax.Array, x: jax.Array) -> jax.Array:
        return lax.cond(pred, gram, lambda x: jnp.tanh(x[:, :32]), x)

    def two(pred: jax.Array, x: jax.Array) -> jax.Array:
        return lax.cond(pred, gram, lambda x: gram(x[:, :32]), x)

    def nested(pred: jax.Array, x: jax.Array) -> jax.Array:
        return repeat(lambda x: lax.cond(pred, lambda x: gram(x) @ x, jnp.sin, x), 3)(x)

    def many(pred: jax.Array, x: jax.Array) -> jax.Array:
        branches = [lambda x, n=n: gram(x[:, :n]) for n in range(8, 72, 8)]
        return lax.switch(pred.astype(int), branches, x)

    assert hlo.dot_flops(text_of(one, FLAG, X)) == GRAM
    assert hlo.dot_flops(text_of(many, FLAG, X)) == GRAM
    assert hlo.dot_flops(text_of(two, FLAG, X)) == GRAM
    assert hlo.dot_flops(text_of(nested, FLAG, X)) == 3 * 2 * GRAM


def test_a_loop_of_unknown_length_raises_only_where_it_matters():
    until = text_of(lambda x: lax.while_loop(lambda c: c.sum() < 9, gram, x[:, :32]), X)
    with pytest.raises(ValueError, match=r"trips of the loop %while\S* \(.*while\)"):
        hlo.dot_flops(until)
    assert hlo.collectives(until) == []
    other = text_of(
        lambda x: gram(lax.while_loop(lambda c: c.sum() < 9, jnp.cosh, x)), X
    )
    assert " while(" in other
    assert hlo.dot_flops(other) == GRAM


def test_collectives_in_a_scan():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

    def step(c: jax.Array) -> jax.Array:
        swapped = lax.all_to_all(c, "a", 0, 0, tiled=True)
        total = lax.psum(c, ("a", "b"))
        gathered = lax.all_gather(c, "b", axis=0, tiled=True)
        scattered = lax.psum_scatter(c, "a", scatter_dimension=0, tiled=True)
        moved = lax.ppermute(c, "a", [(i, (i + 1) % 4) for i in range(4)])
        return swapped + total + gathered[:8] + gathered[8:] + scattered.sum() + moved

    spec = P(("a", "b"))
    mapped = jax.shard_map(
        repeat(step, 3), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    text = text_of(mapped, jax.ShapeDtypeStruct((64, 16), jnp.float32))
    local = 8 * 16 * 4
    found = {
        c.kind: (c.result_bytes, c.moved_bytes, c.bytes, c.count, c.group_size)
        for c in hlo.collectives(text)
    }
    assert len(hlo.collectives(text)) == 5
    assert found == {
        "all-to-all": (local, local * 3 // 4, 3 * local * 3 // 4, 3, 4),
        "all-reduce": (local, local * 7 // 4, 3 * local * 7 // 4, 3, 8),
        "all-gather": (2 * local, local, 3 * local, 3, 2),
        "reduce-scatter": (local // 4, local * 3 // 4, 3 * local * 3 // 4, 3, 4),
        "collective-permute": (local, local, 3 * local, 3, 8),
    }
    names = {c.kind: c.op_name for c in hlo.collectives(text)}
    assert names["all-reduce"].endswith("/psum")


def test_collectives_that_xla_inserts():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    rows = NamedSharding(mesh, P("a", None))
    everywhere = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    text = text_of(lambda x: lax.with_sharding_constraint(x * 2, everywhere), x)
    (gather,) = hlo.collectives(text)
    assert (gather.kind, gather.group_size) == ("all-gather", 4)
    assert (gather.result_bytes, gather.moved_bytes) == (4096, 3072)
    text = text_of(lambda x: lax.with_sharding_constraint(x.T @ x, everywhere), x)
    (reduce,) = hlo.collectives(text)
    assert (reduce.kind, reduce.group_size) == ("all-reduce", 4)
    assert (reduce.result_bytes, reduce.moved_bytes) == (1024, 1536)
    assert hlo.dot_flops(text) == 2 * 16 * 16 * 64 // 4


def test_collectives_of_a_branch():
    mesh = Mesh(np.array(jax.devices()), ("a",))

    # The gather brings a device 7/8 of eight shards, the sum 2 · 7/8 of one.
    def gathered(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, "a", axis=0, tiled=True)[:8]

    def local(pred: jax.Array, x: jax.Array) -> jax.Array:
        return lax.cond(pred, gathered, lambda x: lax.psum(x, "a"), x)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("a")), out_specs=P("a"), check_vma=False
    )
    text = text_of(mapped, FLAG, jax.ShapeDtypeStruct((64, 4), jnp.float32))
    assert " all-reduce(" in text
    assert [c.kind for c in hlo.collectives(text)] == ["all-gather"]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4},{5,6,7}}", 5),
        ("{}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['x'=4,'y'=2] {'x'}", 4),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y','x':(1)2}", 4),
    ],
)
def test_replica_groups(groups: str, size: int):
    line = f"ROOT %r = f32[32,32]{{1,0}} all-reduce(%p), replica_groups={groups}, x=y"
    (found,) = hlo.collectives(program(line))
    assert found.group_size == size
    assert found.moved_bytes == -(-2 * 4096 * (size - 1) // size)


def test_groups_that_are_not_understood_raise():
    with pytest.raises(ValueError, match="%r has no groups"):
        hlo.collectives(
            program("ROOT %r = f32[32,32] all-reduce(%p), replica_groups=?")
        )


def test_asynchronous_collectives_count_once():
    text = program(
        "%g = (f32[32,32]{1,0}, f32[64,32]{1,0:T(8,128)S(1)}) all-gather-start(%p), "
        "replica_groups=[4,2]<=[8], dimensions={0}",
        "%d = f32[64,32]{1,0:T(8,128)S(1)} all-gather-done(%g)",
        "%s = ((f32[32,32]), f32[16,32], u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[32,32]), f32[16,32], u32[]) async-update(%s), calls=%wrapped",
        "ROOT %e = f32[16,32]{1,0} async-done(%u), calls=%wrapped",
    )
    wrapped = """
%wrapped (q: f32[32,32]) -> f32[16,32] {
  %q = f32[32,32]{1,0} parameter(0)
  ROOT %rs = f32[16,32]{1,0} reduce-scatter(%q), replica_groups=[4,2]<=[8], to_apply=%a
}
"""
    found = hlo.collectives(text.replace("\n\n", wrapped, 1))
    assert [(c.kind, c.result_bytes, c.moved_bytes, c.count) for c in found] == [
        ("all-gather", 8192, 4096, 1),
        ("reduce-scatter", 2048, 2048, 1),
    ]


def test_widths_of_tuples():
    types = "(bf16[3]{0}, pred[5]{0}, /*index=2*/s4[3]{0}, f8e4m3fn[7]{0}, c64[])"
    line = f"%r = {types} all-reduce(%p), replica_groups={{{{0,1}}}}"
    (found,) = hlo.collectives(program(line))
    assert found.result_bytes == 6 + 5 + 2 + 7 + 8


def test_a_permute_to_oneself_moves_nothing():
    line = "%r = f32[32,32] collective-permute(%p), source_target_pairs={{0,0},{1,1}}"
    (found,) = hlo.collectives(program(line))
    assert (found.result_bytes, found.moved_bytes) == (4096, 0)


def test_library_products():
    config = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]'
    line = (
        "%r = (f32[32,32]{1,0}, s8[4194304]{0}) custom-call(%p, %p), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        f'{{"dot_dimension_numbers":{{{config}}}}}}}'
    )
    assert hlo.dot_flops(program(line)) == 2 * 32**3
    assert hlo.custom_calls(program(line)) == {"__cublas$gemm": 1}
    for target in ("__onednn$matmul", "__cublas$gemm", "tpu_custom_call"):
        bare = f'%r = f32[32,32] custom-call(%p, %p), custom_call_target="{target}"'
        with pytest.raises(ValueError, match=r"%r .* cannot be counted"):
            hlo.dot_flops(program(bare))
    with pytest.raises(ValueError, match=r"\(convolution, .* cannot be counted"):
        hlo.dot_flops(program("%c = f32[32,32] convolution(%p, %p), dim_labels=bf_io"))


def test_custom_calls_are_counted_with_their_loops():
    def step(x: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(gram(x) + jnp.eye(8))

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    text = text_of(lambda x: jnp.linalg.eigh(repeat(step, 5)(x)), x)
    assert hlo.custom_calls(text) == {"lapack_spotrf_ffi": 5, "lapack_ssyevd_ffi": 1}
    assert hlo.dot_flops(text) == 5 * 2 * 8**3
    solve = text_of(lambda x: jax.scipy.linalg.solve_triangular(x, x), x)
    assert hlo.custom_calls(solve) == {"lapack_strsm_ffi": 1}


def test_solver_flops():
    def step(x: jax.Array) -> jax.Array:
        return lax.linalg.cholesky(gram(x))

    def solve(a: jax.Array, b: jax.Array, left: bool) -> jax.Array:
        return lax.linalg.triangular_solve(a, b, left_side=left, lower=True)

    square = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    assert hlo.solver_flops(text_of(repeat(step, 5), square)) == 5 * 3 * (8**3 // 3)
    for left, shape in ((True, (3, 8, 2)), (False, (3, 2, 8))):
        right = jax.ShapeDtypeStruct(shape, jnp.float32)
        text = text_of(lambda a, b, left=left: solve(a, b, left), square, right)
        assert hlo.solver_flops(text) == 3 * 2 * 8**2
    line = "%r = f32[32,32] {}(%p, %p), lower=true"
    found = [program(line.format(o)) for o in ("cholesky", "triangular-solve")]
    assert [hlo.solver_flops(text) for text in found] == [32**3 // 3, 32**3]
    assert hlo.solver_flops(text_of(gram, square)) == 0
    with pytest.raises(ValueError, match=r"lapack_ssyevd_ffi, .* cannot be counted"):
        hlo.solver_flops(text_of(jnp.linalg.eigh, square))
    for target in ("Qr", "LuDecomposition", "cusolver_potrf_ffi", "cusparse_gtsv2_ffi"):
        line = f'%r = f32[32,32] custom-call(%p), custom_call_target="{target}"'
        with pytest.raises(ValueError, match=f"{target}, .* cannot be counted"):
            hlo.solver_flops(program(line))


def test_other_text_raises():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.dot_flops("module @jit_f {}")
    with pytest.raises(ValueError, match=r"not an instruction: *%r is odd"):
        hlo.dot_flops(program("%r is odd"))
