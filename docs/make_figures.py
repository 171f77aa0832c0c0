"""Draw the figures of docs/protections.md; write its tables, those of docs/smpc.md and of
docs/serving.md and docs/gradients.md from runs.

fedmi run scenarios/dp_frontier.toml --out runs/dp_frontier
fedmi run scenarios/aggregate_size.toml --out runs/aggregate_size
fedmi run scenarios/smpc.toml --out runs/smpc
fedmi run scenarios/midas.toml --out runs/midas
fedmi run scenarios/serving.toml --out runs/serving
fedmi run scenarios/update_channel.toml --out runs/update_channel
fedmi run scenarios/closed_form.toml --out runs/closed_form
fedmi run scenarios/malicious_server.toml --out runs/malicious_server
fedmi run scenarios/malicious_client.toml --out runs/malicious_client
fedmi run scenarios/text.toml --out runs/text
fedmi run scenarios/tabular_gradients.toml --out runs/tabular_gradients
python docs/make_figures.py [folder of the runs]
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradient_tables
import malicious_tables
import numpy as np
import pandas as pd
import serving_tables
import torch
from make_readme import Report, Rows, marks, measured, put, spread
from safetensors.torch import load_file
from smpc_tables import tables

from fedmi.leakage.files import rows_of
from fedmi.leakage.intervals import paired_interval
from fedmi.leakage.row import LeakageRow
from fedmi.report.plots import INK, SERIES, Spec, drawn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WIDTH, HEIGHT = 380, 230
ASIDE = {"plain": 1.0, "SecAgg+": 1.06}
"""So that points of the same number of clients stand side by side."""


@dataclass(frozen=True)
class Point:
    """One figure with its interval, over a place on the horizontal axis."""

    x: float
    y: float
    low: float
    high: float
    series: str = ""
    joined: bool = True
    """By a line with its neighbours: the end of an axis is no neighbour of a finite place."""


def psnr_rows(run: Path) -> list[LeakageRow]:
    return [
        row for row in rows_of(pd.read_parquet(run / "leakage.parquet")) if row.metric == "psnr"
    ]


def epsilon_of(row: LeakageRow) -> float:
    """What the deployment claims; infinity without a claim."""
    return math.inf if math.isnan(row.epsilon) else row.epsilon


# The frontier of epsilon, utility and leakage


def accuracies(run: Path) -> dict[str, tuple[float, float, float]]:
    """Deployment -> mean, smallest and largest held-out accuracy over seeds."""
    costs = pd.read_parquet(run / "costs.parquet")
    by_name = costs.groupby("deployment", sort=False)["utility"]
    return {str(name): (part.mean(), part.min(), part.max()) for name, part in by_name}


def frontier(run: Path) -> Spec:
    """Accuracy and PSNR advantage over epsilon, infinity at the right end."""
    rows = sorted(psnr_rows(run), key=epsilon_of)
    end = 30 * max(row.epsilon for row in rows if math.isfinite(row.epsilon))
    places = {row.deployment: min(epsilon_of(row), end) for row in rows}
    reached, bounds = accuracies(run), {row.deployment: advantage(row) for row in rows}
    utility = [Point(x, *reached[name], joined=x < end) for name, x in places.items()]
    leakage = [Point(x, *bounds[name], joined=x < end) for name, x in places.items()]
    axis = {
        "values": [0.5, 1, 2, 4, 8, *thousands(end), end],
        "labelExpr": f"datum.value >= {0.99 * end} ? '∞' : datum.value < 1000 ? "
        "format(datum.value, '~g') : format(datum.value, '~s')",
        "grid": False,
    }
    x = {"title": "epsilon", "axis": axis, "scale": {"type": "log", "domain": [0.4, 1.5 * end]}}
    return {
        "background": "white",
        "hconcat": [
            panel("Accuracy, range over seeds", utility, x, "held-out accuracy", ".0%"),
            panel("Leakage, 95 % interval", leakage, x, "PSNR advantage, dB", "~s", zero=True),
        ],
        "spacing": 40,
    }


def thousands(end: float) -> list[float]:
    """100, 10 000, ... well below the end of the axis."""
    return [100.0**power for power in range(1, 10) if 100.0**power < end / 5]


def frontier_table(run: Path) -> str:
    reached = accuracies(run)
    lines = [
        "| deployment | epsilon | accuracy, range | PSNR | prior-only | advantage, dB |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in sorted(psnr_rows(run), key=epsilon_of, reverse=True):
        mean, low, high = reached[row.deployment]
        accountant = row.claim.rpartition(", ")[2]
        claim = f"{row.epsilon:,.3g}, {accountant}" if row.claim else "∞"
        claim = re.sub(r"[\d.]+e\+\d+", lambda found: f"{float(found[0]):,.0f}", claim)
        lines.append(
            f"| {row.deployment} | {claim} | {mean:.1%} [{low:.1%}, {high:.1%}] | "
            f"{row.value:.1f} | {row.prior_only:.1f} | {spread(list(advantage(row)))} |"
        )
    return "\n".join([*lines, "", f"{rows_note(run)} Delta is 1e-5."])


# Clients in the mean


@dataclass(frozen=True)
class Mean:
    """What the attack got from the mean of n clients, over all rounds and seeds.

    advantage: mean, and its 95 % interval.
    """

    deployment: str
    channel: str
    clients: int
    value: float
    prior_only: float
    advantage: tuple[float, float, float]

    @property
    def series(self) -> str:
        return "SecAgg+" if self.deployment.startswith("SecAgg+") else "plain"


def averaged(run: Path) -> list[Mean]:
    """One a deployment and channel; a target is one round of one seed."""
    scores = pd.read_parquet(run / "scores.parquet")
    psnr = scores[scores["metric"] == "psnr"]
    return [
        mean_of(str(deployment), str(channel), part)
        for (deployment, channel), part in psnr.groupby(["deployment", "channel"], sort=False)
    ]


def mean_of(deployment: str, channel: str, part: pd.DataFrame) -> Mean:
    value, prior, seeds = (part[name].tolist() for name in ("value", "prior_only", "seed"))
    found = paired_interval(value, prior, seeds, True, np.random.default_rng(0))
    bounds = (found.mean, found.low, found.high)
    clients = int(deployment.rpartition(" ")[2])
    return Mean(deployment, channel, clients, np.mean(value), np.mean(prior), bounds)


def sizes(run: Path) -> Spec:
    """PSNR advantage over the number of clients in the mean."""
    points = [
        Point(mean.clients * ASIDE[mean.series], *mean.advantage, mean.series)
        for mean in averaged(run)
        if mean.channel == "aggregate"
    ]
    axis = {"values": [1, 2, 4, 8, 16], "grid": False}
    scale = {"type": "log", "base": 2, "domain": [0.85, 18.5], "nice": False}
    x = {"title": "clients in the mean", "axis": axis, "scale": scale}
    title = "Leakage of the mean, 95 % interval"
    drawn = panel(title, points, x, "PSNR advantage, dB", "~s", zero=True)
    return {"background": "white", **drawn}


def sizes_table(run: Path) -> str:
    lines = [
        "| deployment | channel | PSNR | prior-only | advantage, dB |",
        "|---|---|---:|---:|---|",
    ]
    lines += [
        f"| {mean.deployment} | {mean.channel} | {mean.value:.1f} | {mean.prior_only:.1f} | "
        f"{spread(list(mean.advantage))} |"
        for mean in averaged(run)
    ]
    same, rounds = equal_at_one(run)
    note = (
        f"{rows_note(run)} A target is one round's mean. In {same} of {rounds} rounds with one "
        "client, twins included, the recorded mean equals that client's update bit for bit."
    )
    return "\n".join([*lines, "", note])


def equal_at_one(run: Path) -> tuple[int, int]:
    """(rounds whose mean equals the one client's update in every bit, rounds with one client)."""
    same = rounds = 0
    for mean in run.glob("cells/*/observations/round-*-aggregate.safetensors"):
        number = mean.name.removesuffix("-aggregate.safetensors")
        updates = list(mean.parent.glob(f"{number}-client-*-client_update-*.safetensors"))
        if len(updates) == 1:
            ours, theirs = load_file(mean), load_file(updates[0])
            same += ours.keys() == theirs.keys() and all(
                torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
            )
            rounds += 1
    return same, rounds


# What both share


def advantage(row: LeakageRow) -> tuple[float, float, float]:
    return row.advantage, row.advantage_ci_low, row.advantage_ci_high


def rows_note(run: Path) -> str:
    scores = pd.read_parquet(run / "scores.parquet")
    keys = ["deployment", "channel", "metric"]
    counts = scores[scores["metric"] == "psnr"].groupby(keys)["target"].size()
    every = " or ".join(str(count) for count in sorted(set(counts)))
    row = psnr_rows(run)[0]
    seeds = scores["seed"].nunique()
    return f"{seeds} seeds, {every} targets a row; {row.attack} by {row.position}."


def panel(
    title: str,
    points: Sequence[Point],
    x: Mapping[str, object],
    y_title: str,
    y_format: str,
    zero: bool = False,
) -> Spec:
    """Points joined by a line, each with its interval; at zero a dashed line if asked."""
    names = list(dict.fromkeys(point.series for point in points))
    colour = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": names, "range": list(SERIES[: len(names)])},
        "legend": {"title": None, "orient": "top-right"} if len(names) > 1 else None,
    }
    across = {"field": "x", "type": "quantitative", **x}
    up = {"type": "quantitative", "title": y_title, "axis": {"format": y_format, "tickCount": 5}}
    base = {"x": across, "color": colour}
    y: Spec = {"y": {**up, "field": "y"}}
    low: Spec = {"y": {**up, "field": "low"}, "y2": {"field": "high"}}
    drawn: list[tuple[Spec, Spec]] = [
        ({"type": "line", "strokeWidth": 1, "opacity": 0.5}, y),
        ({"type": "rule", "strokeWidth": 2}, low),
        ({"type": "point", "filled": True, "size": 70, "opacity": 1}, y),
    ]
    layers: list[Spec] = [{"mark": mark, "encoding": {**base, **more}} for mark, more in drawn]
    layers[0]["transform"] = [{"filter": "datum.joined"}]
    if zero:
        dashed = {"type": "rule", "color": INK, "strokeDash": [3, 3]}
        layers.insert(0, {"mark": dashed, "encoding": {"y": {"datum": 0}}})
    return {
        "title": title,
        "data": {"values": [vars(point) for point in points]},
        "width": WIDTH,
        "height": HEIGHT,
        "layer": layers,
    }


# What the protections cost


def costs() -> str:
    """The benchmarks of the protections, each with its command."""
    described = {
        "secagg_round": secagg,
        "homomorphic": homomorphic,
        "dp_sgd": dp_sgd,
        "mask_recovery": masks,
    }
    return measured(RESULTS, described)


def secagg(found: Report) -> Rows:
    setting = found["setting"]
    of = f"{setting['clients']} clients x {setting['parameters'] / 1e6:g}M parameters"
    yield f"a round of {of}, no protection", f"{found['plain']['seconds a round']} s"
    for name in (name for name in found if name.startswith("SecAgg+")):
        row = found[name]
        yield (
            f"the same, {name}, {setting['shares']} shares",
            f"{row['seconds a round']} s ({row['over plain']} x; CPU {row['CPU over plain']} x), "
            f"{row['bytes up a parameter']:.2f} bytes up a parameter (plain 4), largest error "
            f"{row['largest difference to plain']:.1e} of at most {row['error bound']:.1e}",
        )


def homomorphic(found: Report) -> Rows:
    for name, row in found["variants"].items():
        low, high = row["fedmi over TenSEAL, range"]
        seconds = row["CPU seconds"]["fedmi"]
        yield (
            f"{name}: encrypt, add, decrypt 1M parameters, against raw TenSEAL",
            f"{seconds['encrypt']:.2f} + {seconds['add']:.2f} + {seconds['decrypt']:.2f} CPU s, "
            f"{row['fedmi over TenSEAL']:.2f} x (range {low:.2f} to {high:.2f}), "
            f"{row['bytes a parameter']} bytes a parameter, error of the mean "
            f"{row['largest error of the mean']:.1e}",
        )
    for scheme, row in found["parallel encryption"].items():
        yield (
            f"{scheme}: {row['clients']} clients encrypt in 2 processes in place of one",
            f"{row['speed-up']} x as fast",
        )


def dp_sgd(found: Report) -> Rows:
    for model, modes in found["steps"].items():
        low, high = modes["auto"]["interval"]
        others = ", ".join(
            f"{mode} {modes[mode]['times plain']:.2f}" for mode in ("ghost", "hooks", "functorch")
        )
        yield (
            f"a DP-SGD step over a plain one, {model}",
            f"{modes['auto']['times plain']:.2f} [{low:.2f}, {high:.2f}] ({others})",
        )


def masks(found: Report) -> Rows:
    rate = [row["seeds_a_second"] for row in found["rows"] if row["unknown_masks"] == 1]
    yield (
        "seeds of Flower's mask generator tried a second, one unknown mask, one core",
        f"{min(rate) / 1e6:.2f} to {max(rate) / 1e6:.2f} million",
    )
    for row in found["extrapolated"]:
        hours = row.get("hours", row.get("hours_at_least"))
        table = f", a table of {row['table_gib']:g} GiB" if "table_gib" in row else ""
        least = "at least " if "hours_at_least" in row else ""
        yield (
            f"extrapolated: {row['unknown_masks']} unknown, {row['seeds']} seeds each",
            f"{least}{60 * hours:.0f} minutes{table}",
        )


def main(runs: Path) -> None:
    page = ROOT / "docs" / "protections.md"
    text = put(page.read_text(encoding="utf-8"), *marks("costs"), costs())
    for name, draw, table in (
        ("dp_frontier", frontier, frontier_table),
        ("aggregate_size", sizes, sizes_table),
    ):
        if not (runs / name / "leakage.parquet").is_file():
            print(f"no {runs / name}: its figure and table stay as they are")
            continue
        figure = ROOT / "docs" / "figures" / f"{name}.svg"
        figure.write_text(drawn(draw(runs / name)), encoding="utf-8")
        text = put(text, *marks(name), table(runs / name))
    page.write_text(text, encoding="utf-8")
    computed(runs / "smpc")
    served(runs)
    crossing(runs)
    active(runs)


def crossing(runs: Path) -> None:
    """The tables of docs/gradients.md."""
    page = ROOT / "docs" / "gradients.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (
        ("update_channel", gradient_tables.channel),
        ("closed_form", gradient_tables.closed_form),
    ):
        if (runs / name / "leakage.parquet").is_file():
            text = put(text, *marks(name), table(runs / name))
        else:
            print(f"no {runs / name}: its table in docs/gradients.md stays as it is")
    for name, describe in (
        ("papers", gradient_tables.papers),
        ("federated_averaging", gradient_tables.averaging),
        ("against_breaching", gradient_tables.speed),
    ):
        results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = put(text, *marks(name), gradient_tables.markdown(describe(results)))
    page.write_text(text, encoding="utf-8")


def active(runs: Path) -> None:
    """The tables of docs/malicious.md and docs/text.md."""
    for page, made in (
        (
            "malicious.md",
            (
                ("malicious_server", "malicious_server", malicious_tables.servers),
                ("detection", "malicious_server", malicious_tables.noticed),
                ("false_alarms", "malicious_server", malicious_tables.false_alarms),
                ("malicious_client", "malicious_client", malicious_tables.clients),
            ),
        ),
        (
            "text.md",
            (
                ("text", "text", malicious_tables.sentences),
                ("tabular_gradients", "tabular_gradients", malicious_tables.answers),
            ),
        ),
    ):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, run, table in made:
            if (runs / run / "leakage.parquet").is_file():
                text = put(text, *marks(name), table(runs / run))
            else:
                print(f"no {runs / run}: its table in docs/{page} stays as it is")
        (ROOT / "docs" / page).write_text(text, encoding="utf-8")
    malicious = ROOT / "docs" / "malicious.md"
    text = malicious.read_text(encoding="utf-8")
    for name, results, describe in (
        ("imprint", "imprint", malicious_tables.imprints),
        ("traps", "active_servers", malicious_tables.traps),
        ("fishing", "active_servers", malicious_tables.fishing),
    ):
        found = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))
        text = put(text, *marks(name), gradient_tables.markdown(describe(found)))
    malicious.write_text(text, encoding="utf-8")


def served(runs: Path) -> None:
    """The tables of docs/serving.md."""
    page = ROOT / "docs" / "serving.md"
    text = page.read_text(encoding="utf-8")
    for name, table in (("midas", serving_tables.midas), ("serving", serving_tables.serving)):
        if (runs / name / "leakage.parquet").is_file():
            text = put(text, *marks(name), table(runs / name))
        else:
            print(f"no {runs / name}: its table in docs/serving.md stays as it is")
    for name, results in (
        ("monitor", {"query_monitor": serving_tables.monitor}),
        ("encrypted", {"encrypted_inference": serving_tables.encrypted}),
        ("flips", {"bit_flips": serving_tables.flips}),
    ):
        text = put(text, *marks(name), measured(RESULTS, results))
    page.write_text(text, encoding="utf-8")


def computed(run: Path) -> None:
    """The tables of docs/smpc.md."""
    if not (run / "leakage.parquet").is_file():
        print(f"no {run}: the tables of docs/smpc.md stay as they are")
        return
    page = ROOT / "docs" / "smpc.md"
    text = put(page.read_text(encoding="utf-8"), *marks("figures"), tables(run))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs")
