"""An OpenAPI document as one page: calls by tag, then the schemas that they link to."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "≥ {} characters",
    "maxLength": "≤ {} characters",
    "minItems": "≥ {} items",
    "maxItems": "≤ {} items",
    "pattern": "`{}`",
}
_OPEN = "Needs no key."


def api_page(document: Schema) -> str:
    """Markdown of the whole document."""
    info = document["info"]
    lines = [f"# {info['title']}", "", f"{info['summary']}. Version {info['version']}.", ""]
    lines += [
        "Made of the document that the service answers under `GET /openapi.json`. Errors are",
        "problem details (RFC 9457) of the type `application/problem+json`.",
        "",
    ]
    calls: dict[str, list[str]] = defaultdict(list)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["service"])[0]
            calls[tag] += _call(method.upper(), path, operation)
    for tag, text in calls.items():
        lines += [f"## {tag.capitalize()}", "", *text]
    lines += ["## Schemas", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += [f"### {name} {{ #{_anchor(name)} }}", "", *_schema(schema)]
    return "\n".join(lines) + "\n"


def _call(method: str, path: str, operation: Schema) -> Iterator[str]:
    yield from (f"### `{method} {path}`", "", f"{operation['summary']}.", "")
    if text := operation.get("description"):
        yield from (text, "")
    scopes = [
        s for option in operation.get("security", ()) for names in option.values() for s in names
    ]
    yield from (f"Scope: {', '.join(f'`{s}`' for s in scopes)}." if scopes else _OPEN, "")
    if parameters := operation.get("parameters"):
        yield from _table(
            ("parameter", "in", "type", "default", "meaning"),
            (
                (
                    f"`{p['name']}`", p["in"], _type(p["schema"]), _default(p, p["schema"]),
                    p.get("description", ""),
                )
                for p in parameters
            ),
        )  # fmt: skip
    if body := operation.get("requestBody"):
        for media, content in body["content"].items():
            yield f"Body `{media}`: {_type(content['schema'])}."
        yield ""
    yield from _table(
        ("answer", "meaning", "body"),
        (
            (status, answer["description"], _content(answer))
            for status, answer in operation["responses"].items()
        ),
    )


def _content(answer: Schema) -> str:
    found = answer.get("content", {})
    return ", ".join(
        _type(content["schema"]) if content.get("schema") else f"`{media}`"
        for media, content in found.items()
    )


def _schema(schema: Schema) -> Iterator[str]:
    if text := schema.get("description"):
        yield from (text, "")
    fields = schema.get("properties")
    if fields is None:
        yield from (f"{_type(schema)}.", "")
        return
    required = schema.get("required", ())
    yield from _table(
        ("field", "type", "default", "meaning"),
        (
            (
                f"`{name}`", _type(field),
                _default({"required": name in required}, field), field.get("description", ""),
            )
            for name, field in fields.items()
        ),
    )  # fmt: skip


def _type(schema: Schema) -> str:
    """The type in words, with links to other schemas and with bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_anchor(name)})"
    if options := schema.get("anyOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {_type(schema['additionalProperties'])}"
    elif "format" in schema:
        kind = f"{kind} ({schema['format']})"
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([kind, *bounds])


def _default(holder: Schema, schema: Schema) -> str:
    if holder.get("required"):
        return "required"
    if schema.get("default") is None:
        return "–"
    return f"`{json.dumps(schema['default'], ensure_ascii=False)}`"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield _row(head)
    yield _row(("---",) * len(head))
    for row in rows:
        yield _row(row)
    yield ""


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _anchor(name: str) -> str:
    return f"schema-{name.lower()}"
