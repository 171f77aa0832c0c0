"""What careful clients would have noticed of a malicious server, for terminal and report."""

import math
from dataclasses import dataclass

from rich.text import Text

from fedmi.leakage.detection import Detection, detections_of
from fedmi.report import words
from fedmi.report.data import ReportData


@dataclass(frozen=True)
class DetectionLine:
    """One detector on one deployment, in words."""

    deployment: str
    malice: str
    detector: str
    rate: str
    interval: str
    cases: str
    at: str
    calibration: str
    calibrated_rounds: str
    false_alarms: str
    false_interval: str
    honest: str


def lines(report: ReportData) -> tuple[DetectionLine, ...]:
    """None where no client was deceived, or none measured."""
    return tuple(map(_line, detections_of(report.detection)))


def detection_text(report: ReportData) -> Text | None:
    """A line a deployment and detector, to go under the table."""
    found = lines(report)
    if not found:
        return None
    said = ["What careful clients would have noticed (95 % intervals):"]
    for line in found:
        false = f"{line.false_alarms} {line.false_interval}".strip()
        said.append(
            f"  {line.deployment} ({line.malice}), {line.detector}: detects {line.rate} "
            f"{line.interval} of {line.cases} {line.at}{_where(line)}; false alarms on "
            f"{line.honest} other honest measurements: {false}"
        )
    return Text("\n".join(said))


def _where(line: DetectionLine) -> str:
    """What thresholds come from, and of which rounds."""
    if not line.calibrated_rounds:
        return ""
    return f" (from {line.calibration}, round {line.calibrated_rounds})"


def _line(one: Detection) -> DetectionLine:
    return DetectionLine(
        deployment=one.deployment,
        malice=words.spoken(one.malice),
        detector=words.spoken(one.detector),
        rate=words.percent(one.rate),
        interval=_bounds(one.ci_low, one.ci_high),
        cases=_counted(one.altered, one.altered_clusters),
        at=one.at,
        calibration=one.calibration,
        calibrated_rounds=one.calibrated_rounds,
        false_alarms=words.percent(one.false_alarm_rate),
        false_interval=_bounds(one.false_alarm_ci_low, one.false_alarm_ci_high),
        honest=_counted(one.honest, one.honest_clusters),
    )


def _counted(cases: int, clusters: int) -> str:
    """Cases, and how many rounds of a seed they come from where that is fewer."""
    return f"{cases} (rounds: {clusters})" if clusters < cases else f"{cases}"


def _bounds(low: float, high: float) -> str:
    return (
        ""
        if math.isnan(low) or math.isnan(high)
        else f"[{words.percent(low)}, {words.percent(high)}]"
    )
