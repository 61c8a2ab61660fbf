"""Third-party requirements of distributions of this repository, one a line, for an image's layer.

    python deploy/requirements.py shared[s3] services/generator[worker]

Each argument is a folder with a `pyproject.toml` and maybe extras. The layer that these make stays
the same while only our own code changes. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"synthrep(-[a-z]+)?(\[|$)")


def requirements(argument: str) -> list[str]:
    """What `folder[extra,…]` needs of others; KeyError for an extra that it does not have."""
    folder, _, extras = argument.rstrip("]").partition("[")
    project = tomllib.loads((Path(folder) / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        found += project["optional-dependencies"][extra]
    return [line for line in found if not _OWN.match(line)]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for a in sys.argv[1:] for line in requirements(a))
