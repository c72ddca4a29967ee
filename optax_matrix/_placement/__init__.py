"""Which device works on which matrix, and how matrices get there and back.

Five words are used throughout:

- A **leaf** is an array of the tree.
- A **matrix** is one m×n block of a leaf.
- A **group** is all matrices of one shape (up to transposition), sharding and dtype.
- The **owner** of a matrix is the one device that works on it.
- A **round** is as much of a group as fits in memory at once.

Details have three more: the **piece** of a matrix is the part that one device holds
where the leaf is sharded; **slot** k of an owner is its k-th matrix of a group, and the
last slot may be empty; a **block** is one of the matrices in a fused leaf.

Owners are assigned in turn. Five matrices of a group on four devices, each matrix
sharded in four pieces; ``3b`` is the piece of matrix 3 that device b holds:

    device          a             b             c             d
    holds      0a 1a .. 4a   0b 1b .. 4b   0c 1c .. 4c   0d 1d .. 4d
                        |  one exchange in (all-to-all)  |
    owns          0, 4            1             2             3
                        |   works on its own matrices    |
                        |  one exchange out (all-to-all) |
    holds      0a 1a .. 4a   0b 1b .. 4b   0c 1c .. 4c   0d 1d .. 4d

The first owner of the next group is device b, so that small groups share the devices.
If leaves are replicated there is no exchange in, and the one out is an all-gather.
Without a mesh there are no groups, owners or exchanges: the matrices of one shape are
worked on together.

`map_matrices` does all of this. `Placement` tells it where leaves lie on a mesh with
auto axes, `describe_groups` counts what it costs, and `relay_state` moves saved state
to another mesh.
"""

from optax_matrix._placement.cost import PlacementDescription, describe_groups
from optax_matrix._placement.execute import init_states, map_matrices
from optax_matrix._placement.groups import make_plans
from optax_matrix._placement.pieces import map_pieces
from optax_matrix._placement.placement import (
    Leaf,
    Placement,
    as_placement,
    check_visible,
    resolve,
)
from optax_matrix._placement.relay import relay_state
from optax_matrix._placement.stacks import (
    concatenated,
    map_stack,
    map_stacks,
    matrix_counts,
    split_like,
    stack_size,
)
from optax_matrix._placement.states import MatrixStack

__all__ = [
    "Leaf",
    "MatrixStack",
    "Placement",
    "PlacementDescription",
    "as_placement",
    "check_visible",
    "concatenated",
    "describe_groups",
    "init_states",
    "make_plans",
    "map_matrices",
    "map_pieces",
    "map_stack",
    "map_stacks",
    "matrix_counts",
    "relay_state",
    "resolve",
    "split_like",
    "stack_size",
]
