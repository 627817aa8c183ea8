"""Metrics as somebody of another team writes them: good ones, and ones that break in every way."""

import time

import numpy as np

from evaluation.catalogue import metric
from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement


@metric(version="brevity/1", cost="answers", better="lower", unit="characters", what="length of an answer", longest=48)
def brevity(subject, options):
    asked = subject.gate_set.records
    said = subject.answers(asked, options["longest"])
    return Measurement.of([len(text) for text in said], [record.domain for record in asked])


@metric(version="throws/1", cost="suite", what="nothing at all")
def throws(subject, _options):
    raise ZeroDivisionError(f"no luck with {subject.role}")


@metric(version="nan/1", cost="scores", what="not a number", role="candidate")
def not_a_number(subject, options):
    values = np.ones(len(subject.gate_set.records))
    values[3] = np.nan if subject.role == options["role"] else 1.0
    return Measurement.of(values)


@metric(version="missing/1", cost="suite", what="what a lost file would say")
def lost(subject, _options):
    raise NotMeasured(f"the weights of it are not at {subject.root / 'weights.bin'}")


@metric(version="wrong/1", cost="free", what="no measurement")
def wrong(_subject, _options):
    return 0.7


@metric(version="other/1", cost="free", what="a measurement of other records for every model")
def others(subject, _options):
    return Measurement.of(np.ones(200 if subject.role == "candidate" else 199))


@metric(version="statistic/1", cost="free", what="a statistic that throws")
def bad_statistic(_subject, _options):
    def statistic(_weights, _rows):
        raise ValueError("singular")

    return Measurement(np.ones((200, 1)), statistic)


@metric(version="none/1", cost="free", what="a measurement of no record")
def of_nothing(_subject, _options):
    return Measurement.of([])


@metric(version="slow/1", cost="suite", what="calls")
def counted(subject, _options):
    subject.scorer.calls.append(("counted", subject.role, time.monotonic()))
    return Measurement.of(np.ones(200))


not_a_metric = 7
