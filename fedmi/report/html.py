"""The report as one HTML file: no script, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jinja2
from markupsafe import Markup

from fedmi.leakage.flags import explain, name_of
from fedmi.leakage.row import LeakageRow, split
from fedmi.mpc.profiles import PROFILES
from fedmi.report import detection, plots, serving, tradeoff, words
from fedmi.report.best import Spot, cells, headlines
from fedmi.report.data import Panel, Readings, ReportData
from fedmi.report.images import data_uri
from fedmi.report.matrix import all_spots, deployments, grouped, matrices, sees
from fedmi.report.mpc import section
from fedmi.report.mpc_costs import COMPUTED
from fedmi.report.reported import lines
from fedmi.report.trade_plots import PREFIX

KINDS = ("private", "reconstruction", "prior_only")
P = TypeVar("P", Panel, Readings)
_PANEL = ("deployment", "position", "channel", "attack", "seed")


def render(report: ReportData) -> str:
    """The whole report; everything a user named is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedmi.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "words": words, "split": split, "name_of": name_of, "data_uri": data_uri, "kinds": KINDS,
    }  # fmt: skip
    drawn = {name: Markup(plots.themed(svg, name)) for name, svg in plots.plots(report).items()}
    return environment.get_template("report.html.j2").render(
        report=report,
        rows=report.rows,
        answer=_answer(report),
        deployments=deployments(report),
        who_sees=_who_sees(report),
        protections=_protections(report),
        matrices=matrices(report),
        mpc=section(report),
        computed=COMPUTED,
        networks=[profile.title for profile in PROFILES],
        headline_metrics={row.metric for row in headlines(report.rows, _kinds(report))},
        grouped=grouped,
        panels=_scored(report, report.panels),
        readings=_scored(report, report.readings),
        plots=drawn,
        tradeoff=tradeoff.section(report),
        trade_plots={
            n.removeprefix(PREFIX): svg for n, svg in drawn.items() if n.startswith(PREFIX)
        },
        serving=serving.section(report),
        detection=detection.lines(report),
        reported=lines(report),
        install="" if plots.available() else plots.INSTALL,
        flags=_flags(report),
        claims=_claims(report),
        costs=_costs(report),
        environment=_flat(report.environment),
    )


def _answer(report: ReportData) -> list[tuple[str, list[LeakageRow]]]:
    """Deployment -> the strongest attack of each place and headline metric, and what failed."""
    shown = headlines(report.rows, _kinds(report))
    best = cells(shown, apart=True)
    lines = [row for row in shown if row in best or row.failed]
    return [(name, [r for r in lines if r.deployment == name]) for name in deployments(report)]


Sight = tuple[str, tuple[str, ...]]
"""How a position meets a channel, in words, and the facts that it knows by nature."""


def _who_sees(report: ReportData) -> list[tuple[Spot, list[Sight | None]]]:
    """For each spot and deployment; None where it is not seen."""
    return [
        (place, [_sight(report, name, place) for name in report.views])
        for place in all_spots(report)
    ]


def _sight(report: ReportData, deployment: str, place: Spot) -> Sight | None:
    if not sees(report, deployment, place):
        return None
    at = (place.position, place.channel)
    view = next(v for v in report.views[deployment] if (v.position, v.channel) == at)
    return words.seen(view), tuple(sorted(words.spoken(fact) for fact in view.facts))


def _protections(report: ReportData) -> dict[str, str]:
    return {row.deployment: ", ".join(split(row.protections)) for row in report.rows}


def _kinds(report: ReportData) -> list[str]:
    return [info.kind for info in report.metrics]


def _panel_scores(report: ReportData) -> dict[tuple[object, ...], str]:
    """(panel, target) -> headline score of the reconstruction and of prior-only, in words."""
    shown = {
        (row.deployment, row.position, row.channel, row.attack, row.metric)
        for row in headlines(report.rows, _kinds(report))
    }
    found: dict[tuple[object, ...], str] = {}
    for record in report.scores.to_dict("records"):
        place = (record["deployment"], record["position"], record["channel"], record["attack"])
        if (*place, record["metric"]) in shown:
            key = tuple(record[name] for name in (*_PANEL, "target"))
            value, prior = (words.number(record[k]) for k in ("value", "prior_only"))
            found[key] = f"{value} / {prior}"
    return found


def _scored(report: ReportData, panels: Sequence[P]) -> list[tuple[P, list[str]]]:
    """Each panel with the scores of its rows; no scores where none of its targets has any."""
    scores = _panel_scores(report)
    found: list[tuple[P, list[str]]] = []
    for panel in panels:
        key: tuple[object, ...] = tuple(getattr(panel, name) for name in _PANEL)
        lines = [scores.get((*key, row.target), "") for row in panel.rows]
        found.append((panel, lines if any(lines) else []))
    return found


def _flags(report: ReportData) -> list[tuple[str, int, str]]:
    """Every flag present: name, number of rows that carry it, explanation."""
    counts: dict[str, int] = {}
    for row in report.rows:
        for name in {name_of(flag) for flag in split(row.flags)}:
            counts[name] = counts.get(name, 0) + 1
    return [(name, counts[name], explain(name)) for name in sorted(counts)]


def _claims(report: ReportData) -> dict[str, str]:
    """Each deployment's claims, and against whom they were seen to hold."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in report.rows:
        against = found.setdefault(row.deployment, {})
        if text := words.claim(row):
            against.setdefault(text, set()).add(words.spoken(row.position))
    return {
        name: "; ".join(f"{text} against {', '.join(sorted(who))}" for text, who in texts.items())
        or "none claimed"
        for name, texts in found.items()
    }


def _costs(report: ReportData) -> list[dict[str, str]]:
    """Means over seeds and, for the attacks, sums over them."""
    lines = []
    for name, part in report.costs.groupby("deployment", sort=False):
        trainings = part.drop_duplicates("seed")
        attacks = part.groupby("seed")[["attack_seconds", "queries"]].sum().mean()
        lines.append(
            {
                "deployment": str(name),
                "utility": words.percent(float(trainings["utility"].mean())),
                "training": words.duration(float(trainings["train_seconds"].mean())),
                "wire": words.size(float(trainings["wire_bytes"].mean())),
                "memory": words.size(float(part["peak_memory_bytes"].max())),
                "attacks": words.duration(float(attacks["attack_seconds"])),
                "queries": f"{attacks['queries']:,.0f}",
            }
        )
    return lines


def _flat(mapping: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}: ")
        else:
            shown = (
                words.size(value) if name.endswith("_bytes") and isinstance(value, int) else value
            )
            found.append((prefix + words.spoken(name.removesuffix("_bytes")), str(shown)))
    return found
