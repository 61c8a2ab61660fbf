"""What the demo leaves: `report.json` for programs, a self-contained `report.html` for people."""

from __future__ import annotations

import base64
import html
import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from synthrep_cli.probe_table import ProbeRow
from synthrep_shared.client import SynthRep
from synthrep_shared.samples import parse_member_name

_CAPTIONS_SHOWN = 24
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid; }
.group { display: flex; align-items: center; gap: 2px; margin: 2px 0; flex-wrap: wrap; }
.group span { width: 19rem; } .group img { width: 40px; height: 40px; }
svg { max-width: 100%; height: auto; background: white; } .note { opacity: .75; }
"""


@dataclass(frozen=True)
class DemoReport:
    """The figures of one demo."""

    images_generated: int
    groups_committed: int
    train_steps: int
    images_trained: int
    wall_s: float
    first_step_at: str
    last_shard_committed_at: str
    steps_before_last_shard: int
    probes: list[ProbeRow]
    metrics: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        content = asdict(self)
        del content["metrics"]
        return content


def write_report(report: DemoReport, client: SynthRep, dataset: str, folder: Path) -> None:
    """Write `report.json` and `report.html` into `folder`; images come over REST."""
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    page = _page(report, _gallery(client, dataset))
    (folder / "report.html").write_text(page, encoding="utf-8")


def _gallery(client: SynthRep, dataset: str) -> list[tuple[str, list[str]]]:
    """(caption, data URLs of its images) of some groups of shards spread over the data set."""
    shards = list(client.shards(dataset))
    shards = shards[:: max(1, len(shards) // _CAPTIONS_SHOWN)]
    per_shard = -(-_CAPTIONS_SHOWN // max(1, len(shards)))
    gallery: list[tuple[str, list[str]]] = []
    for shard in shards:
        gallery += _groups(client.shard_bytes(dataset, shard.name))[:per_shard]
    return gallery[:_CAPTIONS_SHOWN]


def _groups(tar: bytes) -> list[tuple[str, list[str]]]:
    captions: dict[str, str] = {}
    images: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            gid, _, suffix = parse_member_name(member.name)
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if suffix == "json":
                captions[gid] = json.loads(data)["caption"]
            else:
                kind = "jpeg" if suffix == "jpg" else suffix
                source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
                images.setdefault(gid, []).append(source)
    return [(captions[gid], sources) for gid, sources in images.items()]


def _page(report: DemoReport, gallery: list[tuple[str, list[str]]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(r.dataset)}</td><td>{r.n_test}</td>"
        f"<td><b>{_with_interval(r.trained, r.ci95)}</b></td>"
        f"<td>{_with_interval(r.random_init, r.random_init_ci95)}</td>"
        f"<td>{_with_interval(r.pixels, r.pixels_ci95)}</td><td>{r.majority:.1%}</td></tr>"
        for r in report.probes
    )
    groups = "".join(
        f'<div class="group"><span>{html.escape(text)}</span>'
        + "".join(f'<img alt="" src="{source}">' for source in images)
        + "</div>"
        for text, images in gallery
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SynthRep demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{PAGE_STYLE}</style></head><body>
<h1>SynthRep: from captions to a vision encoder</h1>
<p>{report.groups_committed} captions became {report.images_generated} images, and an encoder
that began untrained learned from them <b>while they were being made</b>:
{report.steps_before_last_shard} of {report.train_steps} steps were done before the last shard was
sealed. It saw {report.images_trained} views in {report.wall_s / 60:.1f} minutes.</p>
<h2>What the encoder is worth</h2>
{_probe_chart(report.probes)}
<table><thead><tr><th>set</th><th>test images</th><th>trained</th><th>untrained encoder</th>
<th>raw pixels</th><th>majority</th></tr></thead><tbody>{rows}</tbody></table>
<p class="note">Accuracy of a linear classifier on frozen features, 95 % interval in brackets. The
regularisation strength is chosen on a validation split; the test split is read once.</p>
<h2>How it learned</h2>{_loss_chart(report.metrics)}
<h2>What it learned from</h2>
<p class="note">Every row is one caption; its images are positives of each other.</p>{groups}
</body></html>
"""


def svg(figure: Any) -> str:
    """A figure as an `svg` element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _probe_chart(rows: list[ProbeRow]) -> str:
    figure = Figure(figsize=(8, 0.75 * len(rows) + 1))
    axes = figure.subplots()
    kinds = (
        ("trained", "ci95", "o", "#1b6ca8"),
        ("random_init", "random_init_ci95", "s", "#999999"),
        ("pixels", "pixels_ci95", "^", "#d98e04"),
    )
    labels = {
        "trained": "trained encoder",
        "random_init": "untrained encoder",
        "pixels": "raw pixels",
    }
    for shift, (name, interval, marker, colour) in enumerate(kinds):
        values = [100 * getattr(r, name) for r in rows]
        bounds = [getattr(r, interval) for r in rows]
        # A bound may lie beyond its value by a rounding error, as that of 100 % does.
        spread = [
            [max(0.0, v - 100 * low) for v, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, 100 * high - v) for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        places = [i + 0.2 * (1 - shift) for i in range(len(rows))]
        axes.errorbar(values, places, xerr=spread, fmt=marker, color=colour, capsize=3,
                      label=labels[name])  # fmt: skip
    axes.set_yticks(range(len(rows)), [r.dataset for r in rows])
    axes.set_xlabel("accuracy of a linear classifier, %")
    axes.legend(loc="best", fontsize=8)
    return svg(figure)


def _loss_chart(metrics: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(8, 2.6))
    axes = figure.subplots()
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="#1b6ca8")
    axes.set_xlabel("step")
    axes.set_ylabel("multi-positive contrastive loss")
    return svg(figure)


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    """`93.2% [92.1, 94.3]`."""
    return f"{value:.1%} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
