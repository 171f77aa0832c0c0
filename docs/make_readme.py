"""Write the README's tables and figures from finished runs.

make demo
fedmi run scenarios/update_protections.toml --out runs/update_protections
fedmi run scenarios/smpc.toml --out runs/smpc
fedmi run scenarios/deployments.toml --out runs/deployments
make docs
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from deployments_table import matrix

from fedmi.leakage.files import rows_of

ROOT = Path(__file__).parent.parent
Report = dict[str, Any]
Rows = Iterator[tuple[str, str]]
SHOWN = {
    "class": ("attack_accuracy_top1", "pearson_correlation"),
    "batch": ("psnr", "ssim"),
    "labels": ("label_recovery_rate",),
}


def table(leakage: pd.DataFrame) -> str:
    """A Markdown table: two metrics an attack, with the advantage and its 95 % interval."""
    lines = [
        "| deployment | position, channel | attack | metric | value | prior-only | advantage |",
        "|---|---|---|---|---:|---:|---|",
    ]
    wanted = {metric for metrics in SHOWN.values() for metric in metrics}
    for row in leakage[leakage["metric"].isin(wanted)].itertuples():
        if pd.isna(row.round) and row.metric in SHOWN["batch"]:
            continue
        if not pd.isna(row.round) and row.metric in SHOWN["class"]:
            continue
        when = "" if pd.isna(row.round) else f", round {row.round}"
        lines.append(
            f"| {row.deployment} | {row.position}, {row.channel} | {row.attack}{when} | "
            f"{row.metric} | {row.value:.3g} | {row.prior_only:.3g} | {row.advantage:+.3g} "
            f"[{row.advantage_ci_low:.3g}, {row.advantage_ci_high:.3g}] |"
        )
    return "\n".join(lines)


def protections(leakage: pd.DataFrame) -> str:
    """The places of the runs on faces."""
    leakage = leakage[leakage["deployment"].str.contains("att_faces") & leakage["value"].notna()]
    return places(
        leakage.assign(deployment=leakage["deployment"].str.replace(" kind=att_faces", ""))
    )


def places(leakage: pd.DataFrame) -> str:
    """One row a place that somebody attacked; the first of several rounds stands."""
    lines = [
        "| deployment (accuracy) | position, channel | attack | value | prior-only | advantage |",
        "|---|---|---|---:|---:|---|",
    ]
    first = leakage.groupby(["deployment", "position", "channel", "attack"])["round"].transform(
        "min"
    )
    shown = leakage[(leakage["round"] == first) | leakage["round"].isna()]
    for row in shown.itertuples():
        if row.metric != _headline(row.attack, row.round):
            continue
        audit = row.metric == "epsilon_lower_bound"
        claim = f", claim {row.epsilon:.3g}" if audit else ""
        gap = f" [{row.advantage_ci_low:.3g}, {row.advantage_ci_high:.3g}]"
        gain = f"{row.advantage:+.3g}{'' if pd.isna(row.advantage_ci_low) else gap}"
        lines.append(
            f"| {row.deployment} ({row.utility:.0%}) | {row.position}, {row.channel} | "
            f"{row.attack}: {row.metric}{claim} | {row.value:.3g} | {row.prior_only:.3g} | {gain} |"
        )
    return "\n".join(lines)


def _headline(attack: str, round: float) -> str:
    if attack == "canary_audit":
        return "epsilon_lower_bound"
    return "attack_accuracy_top1" if pd.isna(round) else "psnr"


def utilities(leakage: pd.DataFrame) -> str:
    means = leakage.groupby("deployment", sort=False)["utility"].first()
    return "; ".join(f"{name} {value:.1%}" for name, value in means.items())


def pictures(run: Path) -> list[str]:
    """Copy the sheets of the first seed into docs/figures; their Markdown."""
    folder = ROOT / "docs" / "figures"
    for old in folder.glob("reconstructions-*.png"):
        old.unlink()
    found = []
    for sheet in sorted((run / "figures").glob("reconstructions-*.png")):
        shutil.copy(sheet, folder / sheet.name)
        title = sheet.stem.removeprefix("reconstructions-").replace("-", ", ")
        found.append(f"**{title}**\n\n![{title}](docs/figures/{sheet.name})")
    return found


def measured(folder: Path, described: Mapping[str, Callable[[Report], Rows]]) -> str:
    """Benchmarks' results in one table, each with its command; described: by name of the file."""
    lines = ["| what | measured | command |", "|---|---|---|"]
    for name, describe in described.items():
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        lines += [
            f"| {what} | {value} | `benchmarks/{name}.py` |" for what, value in describe(found)
        ]
    return "\n".join(lines)


def faces(found: Report) -> Rows:
    for name, error in found["test_error"].items():
        yield (
            f"AT&T, 40 people: test error of {name} (Fredrikson et al. 2015 report "
            f"{error['paper_percent']} %)",
            f"{error['percent']} % {error['ci']}, {error['splits']} splits",
        )
    for name, row in found["attack"].items():
        if isinstance(row, dict):
            value, prior, advantage = (
                row["attack_accuracy_top1"][k] for k in ("value", "prior_only", "advantage")
            )
            yield (
                f"MI-FACE on {name.replace('_', ' ')}: evaluator top-1",
                f"{value[0]:.2f}, prior-only {prior[0]:.2f}, advantage {spread(advantage)}",
            )


def gradients(found: Report) -> Rows:
    for row in found["rows"]:
        yield (
            f"Inverting Gradients, untrained {row['model']['kind']}, batch of 1: PSNR",
            f"{row['psnr_db']:.1f} dB, prior-only {row['prior_only_db']:.1f} dB, advantage "
            f"{spread(row['advantage_db'])} dB, {row['faces']} faces",
        )


def rounds(found: Report) -> Rows:
    summary = found["summary"]
    for name in ("fedmi, 1 on Ray", "fedmi, 2 on Ray", "Flower"):
        ratio = summary[f"{name}: wall x workers over plain"]
        yield f"50 clients x 50 images, time x workers over a plain loop: {name}", f"{ratio:.2f}"
    ours, theirs = (summary[f"overhead ms a client, {name}"] for name in ("fedmi", "Flower"))
    yield "overhead per client: fedmi, Flower's simulation", f"{ours:.2f} ms, {theirs:.2f} ms"


def intervals(found: Report) -> Rows:
    for row in found["rows"]:
        yield (
            f"coverage of 95 % intervals, {row['seeds']} seeds x {row['targets_a_seed']} "
            f"{'same' if row['same_targets'] else 'own'} targets, seeds differing "
            f"{row['between_over_within_seeds']} x as much as targets",
            f"{row['coverage']:.1%}",
        )


def peer(found: Report) -> Rows:
    for row in found["rows"]:
        name, quality = row["network"]["kind"], row["quality"]
        for part in row["throughput"]:
            ratio = part["speedup"]
            yield (
                f"gradient matching, {name}, {part['targets']} targets: times as fast as breaching",
                f"{ratio['median']} [{ratio['low']}, {ratio['high']}]",
            )
        whole, inner = (quality[at]["difference_db"] for at in ("whole_image", "without_edge"))
        yield (
            f"gradient matching, {name}: PSNR against breaching's, paired",
            f"{spread(whole)} dB, without the edge {spread(inner)} dB, {quality['images']} images",
        )


def spread(interval: list[float]) -> str:
    return f"{interval[0]:+.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"


def put(text: str, start: str, end: str, block: str) -> str:
    """The text with what stands between the two marks replaced."""
    return f"{text.split(start, maxsplit=1)[0]}{start}\n\n{block}\n\n{end}{text.split(end)[1]}"


def read(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "leakage.parquet")


def main(run: Path, guarded: Path, shared: Path, every: Path) -> None:
    leakage = read(run)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = "\n\n".join(
        [
            table(leakage),
            f"Held-out accuracy: {utilities(leakage)}. Intervals: 95 %, paired bootstrap over "
            f"{leakage['n'].max()} targets at most. From top to bottom: private face, "
            "reconstruction, prior-only.",
            *pictures(run),
        ]
    )
    text = put(text, *marks("quickstart"), block)
    if guarded.is_dir():
        text = put(text, *marks("protections"), protections(read(guarded)))
    if shared.is_dir():
        text = put(text, *marks("smpc"), places(read(shared)))
    if every.is_dir():
        costs = pd.read_parquet(every / "costs.parquet")
        text = put(text, *marks("deployments"), "\n".join(matrix(rows_of(read(every)), costs)))
    described = {
        "mi_face": faces,
        "inverting_gradients": gradients,
        "against_breaching": peer,
        "round_overhead": rounds,
        "interval_coverage": intervals,
    }
    text = put(text, *marks("benchmarks"), measured(ROOT / "benchmarks" / "results", described))
    readme.write_text(text, encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: start -->", f"<!-- {name}: end -->"


if __name__ == "__main__":
    runs = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs"
    main(runs / "quickstart", runs / "update_protections", runs / "smpc", runs / "deployments")
