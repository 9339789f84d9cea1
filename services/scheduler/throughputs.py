"""Predicted against measured throughput of each verifier, and when to worry."""

from __future__ import annotations

import logging
import math
from collections.abc import Container

from dspark.errors import ProtocolError
from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.throughput import PredictedThroughput

log = logging.getLogger(__name__)


class Throughputs:
    """By incarnation, from reports. `of` is for exporters of metrics to read."""

    def __init__(self, alarm_above: float) -> None:
        self._alarm_above = alarm_above
        self.of: dict[str, PredictedThroughput] = {}

    def take(self, report: pb.StepReport) -> None:
        """Take in a report; ProtocolError if its prediction cannot be."""
        figures = report.predicted_tokens, report.predicted_ms, report.round_ms
        if not all(math.isfinite(value) and value >= 0 for value in figures):
            raise ProtocolError(f"predictions and times are finite and from 0 on; got {figures}")
        if not all(figures):
            return  # nothing was searched for, or the engine rested before
        one = self.of.setdefault(report.incarnation, PredictedThroughput(self._alarm_above))
        changed = one.take(
            report.predicted_tokens, report.predicted_ms, report.decoded_tokens, report.round_ms
        )
        if not changed:
            return
        if one.alarm:
            log.warning(
                "verifier %s brings %.2f of the throughput that its steps are planned by "
                "(%.4g of %.4g tokens/s): %.2f of the expected tokens in %.2f of the predicted "
                "time; see `dspark plan explain`",
                report.incarnation,
                one.ratio,
                one.measured_per_s,
                one.predicted_per_s,
                one.token_ratio,
                one.time_ratio,
            )
        else:
            log.info("verifier %s brings what its steps are planned by again", report.incarnation)

    def keep(self, alive: Container[str]) -> None:
        """Forget those that are gone."""
        self.of = {name: one for name, one in self.of.items() if name in alive}

    def statuses(self) -> list[pb.ThroughputStatus]:
        """For operators."""
        return [
            pb.ThroughputStatus(
                incarnation=name,
                steps=one.steps,
                predicted_tokens_per_s=one.predicted_per_s,
                measured_tokens_per_s=one.measured_per_s,
                token_ratio=one.token_ratio,
                time_ratio=one.time_ratio,
                alarm=one.alarm,
            )
            for name, one in self.of.items()
        ]
