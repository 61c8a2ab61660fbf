"""Makes a strict JSON schema of the custom resources that the manifests use, from their CRDs.

    python k8s/schemas/derive.py SOURCE CRD.yaml…

writes `KIND.json` beside this file for each. Unknown fields become errors, except where the CRD
keeps them; descriptions are left out. SOURCE says where the CRD is from, e.g. a repository's tag.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_DROPPED = ("description", "example", "externalDocs")


def strict(schema: Any) -> Any:
    """The schema with unknown fields forbidden wherever it says which there are."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: strict(part) for name, part in value.items()}
        elif not (key.startswith("x-kubernetes-") or (key in _DROPPED and isinstance(value, str))):
            found[key] = strict(value)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not keeps_unknown:
        found.setdefault("additionalProperties", False)
    return found


def main() -> None:
    """Write a schema for the newest served version of each CRD."""
    source, *files = sys.argv[1:]
    for file in files:
        crd = yaml.safe_load(Path(file).read_text())["spec"]
        served = [version for version in crd["versions"] if version["storage"]]
        (version,) = served
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schema["$comment"] = f"derived from {source}, Apache-2.0"
        schema["$id"] = f"{crd['group']}/{version['name']}/{crd['names']['kind']}"
        name = f"{crd['names']['kind'].lower()}.json"
        text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
        Path(__file__).with_name(name).write_text(f"{text}\n")


if __name__ == "__main__":
    main()
