"""Tables for descriptions."""

from collections.abc import Collection, Sequence


def aligned(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    totals: Sequence[Sequence[str]],
    right: Collection[int],
) -> str:
    """Returns lines of aligned cells, with rules below the header and above any totals.

    Args:
      header: The names of the columns.
      rows: Rows with one cell per column.
      totals: The last rows, which may be none.
      right: Which columns are aligned to the right.
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
    last = [rule, *lines[end:]] if totals else []
    return "\n".join([lines[0], rule, *lines[1:end], *last])
