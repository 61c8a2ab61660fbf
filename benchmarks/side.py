"""One side of a comparison in a process of its own: `python -m benchmarks.side NAME JSON`."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Call the named function with the given arguments; its value is the last line printed."""
    module, _, name = sys.argv[1].partition(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(value))


if __name__ == "__main__":
    main()
