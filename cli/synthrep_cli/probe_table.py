"""Results of probes as rows, and as a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from synthrep_shared.messages import ProbeView


@dataclass(frozen=True)
class ProbeRow:
    """One probe set's line of the table; intervals are 95 %."""

    dataset: str
    protocol: str
    metric: str
    n_test: int
    trained: float
    ci95: tuple[float, float]
    random_init: float
    random_init_ci95: tuple[float, float]
    pixels: float
    pixels_ci95: tuple[float, float]
    majority: float

    @classmethod
    def from_view(cls, view: ProbeView) -> ProbeRow:
        """The row of a completed probe."""
        baselines = view.baselines or {}
        random_init, pixels = baselines["random_init"], baselines["pixels"]
        assert view.value is not None
        assert view.ci95 is not None
        return cls(
            dataset=view.dataset,
            protocol=view.protocol,
            metric=view.metric or "",
            n_test=view.n_test or 0,
            trained=view.value,
            ci95=view.ci95,
            random_init=random_init["value"],
            random_init_ci95=tuple(random_init["ci95"]),
            pixels=pixels["value"],
            pixels_ci95=tuple(pixels["ci95"]),
            majority=baselines["majority"]["value"],
        )

    @property
    def is_better_than_untrained(self) -> bool:
        """Whether the two intervals are apart, the trained one above."""
        return self.ci95[0] > self.random_init_ci95[1]

    @property
    def verdict(self) -> str:
        """`better` or `worse` than untrained where the intervals are apart, else `overlap`."""
        if self.is_better_than_untrained:
            return "better"
        return "worse" if self.ci95[1] < self.random_init_ci95[0] else "overlap"


def probe_table(rows: list[ProbeRow]) -> Table:
    """The table for the terminal, narrow enough for 80 columns."""
    protocols = ", ".join(sorted({row.protocol for row in rows}))
    table = Table(title=f"Probes of frozen features: {protocols} (95 % interval below)")
    table.add_column("set")
    for name in ("tests", "trained", "untrained", "pixels", "majority", "verdict"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.dataset,
            str(row.n_test),
            _over_interval(row.trained, row.ci95),
            _over_interval(row.random_init, row.random_init_ci95),
            _over_interval(row.pixels, row.pixels_ci95),
            f"{row.majority:.1%}",
            row.verdict,
        )
    table.caption = "verdict: trained against untrained, by whether their intervals are apart"
    return table


def _over_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.1%}\n{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"
