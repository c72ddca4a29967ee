"""Writes docs/tour/data: `make widgets`, or `make widgets ARGS="bowl valley"`."""

import json
import sys
from pathlib import Path

from . import WIDGETS

FOLDER = Path(__file__).parents[1] / "data"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or WIDGETS:
        text = json.dumps(WIDGETS[name](), separators=(",", ":"), ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
