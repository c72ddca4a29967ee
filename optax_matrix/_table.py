"""The tables that descriptions print."""

from collections.abc import Collection, Sequence


def aligned(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    totals: Sequence[Sequence[str]],
    right: Collection[int],
) -> str:
    """Returns lines of aligned cells, with a rule below the header and above totals.

    Args:
      header: The columns' names.
      rows: A cell for each column.
      totals: The last rows.
      right: Which columns are aligned on the right, as numbers are.
    """
    cells = (header, *rows, *totals)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    end = 1 + len(rows)
    return "\n".join([lines[0], rule, *lines[1:end], rule, *lines[end:]])
