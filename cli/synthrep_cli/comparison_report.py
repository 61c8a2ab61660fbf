"""What a comparison leaves: `report.json`, `report.md`, and a self-contained `report.html`."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from synthrep_cli.comparison import Finished
from synthrep_cli.comparison_statistics import MIN_TEST_IMAGES, NUM_RESAMPLES
from synthrep_cli.comparison_summary import Summary, cost_table, statement, summarise
from synthrep_cli.report import PAGE_STYLE, svg
from synthrep_shared.storage import publish_bytes

_WORLDS = {
    "photos": "Real rows train on photos. Where these come from the train part of a set that rows "
    "are judged on, as CIFAR-10's do, real rows have seen its images, CLIP with the classes as "
    "captions; a generator that learned from the same photos passes them on.",
    "drawings": "The real world here is drawings, digits and clothes: the train parts of labelled "
    "sets that travel with the project. The real rows have so seen, without labels, images of the "
    "very sets that rows are judged on; the generated rows have not.",
    "": "",
}
_TEST = (
    "Accuracy of a linear classifier on frozen features, its strength chosen on a validation part; "
    "its mean over classes where a set is published so, which report.json says. "
    "In brackets the 95 % interval of the mean over seeds: a bootstrap over seeds and test images, "
    f"{NUM_RESAMPLES} resamples; of one seed, over test images alone. Bold: best, and the same "
    "bootstrap of the difference to the second-best row, paired over seeds and test images, "
    "excludes 0, with three seeds or more. Sets with fewer than "
    f"{MIN_TEST_IMAGES} test images, or where nothing beats raw pixels, are not counted. Where "
    "seeds differ by more than test images account for, such an interval of three is too narrow."
)


def write_reports(parts: Sequence[Finished], folder: Path) -> Summary:
    """Write the three files, and `comparisons/NAME.json` for the trainer's API.

    The first part is the comparison; the others are its ablations. Returns the first's summary.
    """
    summaries = [summarise(part.rows) for part in parts]
    reports = [_json(part, summary) for part, summary in zip(parts, summaries, strict=True)]
    answer = reports[0] | ({"ablations": reports[1:]} if reports[1:] else {})
    text = json.dumps(answer, indent=1) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    served = folder / "trainer" / "comparisons"
    served.mkdir(parents=True, exist_ok=True)
    publish_bytes(text.encode(), served / f"{parts[0].config.name}.json", replace=True)
    pairs = list(zip(parts, summaries, strict=True))
    markdown = "\n".join(_markdown(part, summary) for part, summary in pairs)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "report.html").write_text(_page(pairs, folder), encoding="utf-8")
    return summaries[0]


def _json(part: Finished, summary: Summary) -> dict[str, Any]:
    fields = ("row", "seed", "dataset", "protocol", "metric", "value", "ci95", "n_test")
    return {
        "id": part.config.name,
        "rows": [r.model_dump(mode="json", include=set(fields)) for r in part.rows],
        "summary": summary.as_json(),
        "statement": statement(summary, part.config.rows, len(part.config.seeds)),
        "counted": {n: v.is_counted for n, v in summary.verdicts.items()},
        "cost": cost_table(part.rows),
        "world": part.world,
        "failures": part.failures,
        "configuration": part.config.model_dump(mode="json"),
    }


def _cell(summary: Summary, name: str, row: str) -> tuple[str, bool]:
    found = summary.means[name].get(row)
    if found is None:
        return "–", False
    low, high = found.ci95
    is_bold = summary.is_best(name, row) and summary.verdicts[name].is_significant
    return f"{100 * found.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]", is_bold


def _facts(part: Finished) -> str:
    world, budget = part.config.generated, part.config.budget
    views = budget.steps * budget.views_per_batch
    return (
        f"{world.num_captions} captions with {world.images_per_caption} images each by "
        f"{world.model}. Every trained row sees {views:,} image views in batches of "
        f"{budget.views_per_batch}, with the same encoder, augmentation and "
        f"{part.config.tuning_trials} tuning trials. Seeds: "
        f"{', '.join(map(str, part.config.seeds))}. "
        f"{_WORLDS[part.world]}"
    ).strip()


def _markdown(part: Finished, summary: Summary) -> str:
    names = list(summary.means)
    lines = [f"# Comparison: {part.config.name}", "", _facts(part), ""]
    lines += ["| row | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in part.config.rows:
        cells = [_cell(summary, name, row) for name in names]
        texts = (f"**{text}**" if is_bold else text for text, is_bold in cells)
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    lines += ["", f"*{_TEST}*", "", "## What the evidence says", ""]
    said = statement(summary, part.config.rows, len(part.config.seeds))
    lines += [f"- {sentence}" for sentence in said]
    lines += [
        "",
        "## Cost",
        "",
        "| row | runs | views | minutes a run | on |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['row']} | {c['runs']} | {c['views']} | {c['minutes']} | {c['device']} |"
        for c in cost_table(part.rows)
    ]
    if part.failures:
        lines += ["", "## What failed", "", *(f"- {failure}" for failure in part.failures)]
    return "\n".join(lines) + "\n"


def _page(pairs: Sequence[tuple[Finished, Summary]], folder: Path) -> str:
    sections = "".join(_section(part, summary, folder) for part, summary in pairs)
    title = html.escape(pairs[0][0].config.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SynthRep comparison: {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style></head><body>{sections}</body></html>
"""


def _section(part: Finished, summary: Summary, folder: Path) -> str:
    names, config = list(summary.means), part.config
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = ""
    for row in config.rows:
        cells = (_cell(summary, name, row) for name in names)
        texts = (f"<td><b>{text}</b></td>" if bold else f"<td>{text}</td>" for text, bold in cells)
        body += f"<tr><td>{html.escape(row)}</td>{''.join(texts)}</tr>"
    said = statement(summary, config.rows, len(config.seeds))
    cost = "".join(
        f"<tr><td>{html.escape(c['row'])}</td><td>{c['runs']}</td><td>{c['views']:,}</td>"
        f"<td>{c['minutes']}</td><td>{c['device']}</td></tr>"
        for c in cost_table(part.rows)
    )
    return f"""<h1>Comparison: {html.escape(config.name)}</h1><p>{html.escape(_facts(part))}</p>
<table><thead><tr><th>row</th>{head}</tr></thead><tbody>{body}</tbody></table>
<p class="note">{html.escape(_TEST)}</p>
<h2>What the evidence says</h2><ul>{_items(said)}</ul>
{f"<h2>What failed</h2><ul>{_items(part.failures)}</ul>" if part.failures else ""}
<h2>How the rows stand</h2>{_means_chart(part, summary)}
<h2>How they learned</h2>{_loss_charts(part, folder)}
<h2>Cost</h2><table><thead><tr><th>row</th><th>runs</th><th>views a run</th><th>minutes a run</th>
<th>on</th></tr></thead><tbody>{cost}</tbody></table>
"""


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def _means_chart(part: Finished, summary: Summary) -> str:
    names, rows = list(summary.means), part.config.rows
    if not names:
        return ""
    figure = Figure(figsize=(8, 0.16 * len(names) * len(rows) + 1.5))
    axes = figure.subplots()
    for shift, row in enumerate(rows):
        there = [(i, summary.means[n][row]) for i, n in enumerate(names) if row in summary.means[n]]
        values = [100 * found.mean for _, found in there]
        bounds = [found.ci95 for _, found in there]
        spread = [
            [max(0.0, v - 100 * low) for v, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, 100 * high - v) for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        places = [i - 0.8 * (shift + 0.5) / len(rows) + 0.4 for i, _ in there]
        axes.errorbar(values, places, xerr=spread, fmt="o", markersize=4, capsize=2, label=row)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("score of a linear classifier, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return svg(figure)


def _loss_charts(part: Finished, folder: Path) -> str:
    """A panel a row: losses of different objectives cannot be compared with each other."""
    curves: dict[str, list[dict[str, Any]]] = {}
    keys = {(r.row, r.key) for r in part.rows}
    for row, key in sorted(keys):
        path = folder / "curves" / f"{key}.json"
        if path.is_file():
            curves.setdefault(row, []).append(json.loads(path.read_text()))
    if not curves:
        return "<p>The curves were drawn where the runs were made.</p>"
    figure = Figure(figsize=(8, 2.2 * -(-len(curves) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(curves) // 3), 3, squeeze=False).ravel()
    for panel, (row, found) in zip(panels, curves.items(), strict=False):
        panel.set_title(row, fontsize=9)
        for curve in found:
            panel.plot(*zip(*curve["points"], strict=True), linewidth=1)
        panel.tick_params(labelsize=7)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    return svg(figure)
