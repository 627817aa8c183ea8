"""Every alarm leads to a section of the runbook, and every rule for Prometheus to one, by metrics that are exported."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from ingest.metrics import ALARMS, IngestMetrics
from serving.alarms import Alarm
from serving.metrics import Metrics
from serving.router_metrics import RouterMetrics
from tidegate import doctor, runbook
from tidegate.gauges import BudgetGauges

ROOT = Path(__file__).resolve().parents[2]
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
# How alarms are raised, by package: the kind is the first argument everywhere.
RAISED = {
    "serving": (r'Alarm\(\s*"(\w+)"', r'_troubles\[stream, "(\w+)"\]'),
    "ingest": (r'\.alarm\(\s*"(\w+)"',),
    "tidegate": (r'pointed\(\s*"(\w+)"',),
}


def raised():
    """Every kind of alarm in the code."""
    return {
        kind
        for package, patterns in RAISED.items()
        for file in (ROOT / package).rglob("*.py")
        for pattern in patterns
        for kind in re.findall(pattern, file.read_text(encoding="utf-8"))
    }


def exported():
    """Types of every metric by its name, as Prometheus reads them."""
    pages = [Metrics({}).page(), RouterMetrics(SimpleNamespace(replicas=(), agreements={})).page()]
    registry = CollectorRegistry()
    IngestMetrics.make(registry)
    BudgetGauges(registry)
    pages.append(generate_latest(registry))
    return dict(re.findall(r"^# TYPE (\S+) (\S+)", b"\n".join(pages).decode(), flags=re.MULTILINE))


def test_every_alarm_has_its_section_and_every_section_its_alarm():
    kinds = raised()
    assert {"registry", "killed", "gap", "stuck", "replica"} <= kinds
    pointed = {re.search(r"#(\w+)$", rule["annotations"]["runbook"]) for rule in RULES}
    of_rules = {found[1] for found in pointed if found}
    assert kinds | set(doctor.KINDS) | of_rules == set(runbook.sections())
    assert all(len(text) > 60 for text in runbook.sections().values())


def test_what_ingest_counts_is_there_before_it_grows():
    """A series that begins at 1 has not grown for Prometheus, so that a first alarm would call nobody."""
    pattern, package = RAISED["ingest"][0], ROOT / "ingest"
    kinds = {kind for file in package.rglob("*.py") for kind in re.findall(pattern, file.read_text(encoding="utf-8"))}
    assert kinds == set(ALARMS)
    registry = CollectorRegistry()
    IngestMetrics.make(registry).begin("desk")
    counts = [("blocks", {}), *(("alarms", {"kind": kind}) for kind in kinds)]
    for name, labels in counts:
        assert registry.get_sample_value(f"tidegate_ingest_{name}_total", {"stream": "desk", **labels}) == 0


def test_an_alarm_that_is_raised_elsewhere_is_found(tmp_path):
    line = 'found.append(Alarm("newkind", "", "x"))'
    assert re.findall(RAISED["serving"][0], line) == ["newkind"]
    assert "newkind" not in runbook.sections()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_is_exported_and_leads_to_the_runbook(rule):
    kinds = exported()
    names = set(re.findall(r"\btidegate_\w+", rule["expr"]))
    assert names or rule["expr"].startswith("up{")  # Prometheus' own, of what it scrapes
    for name in names:
        whole = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in kinds or kinds.get(whole) == "histogram", name
        grows = kinds.get(name, kinds.get(whole)) in {"counter", "histogram"}
        assert grows == bool(re.search(rf"(rate|increase)\({name}\b", rule["expr"])), name
    for opening, closing in ("()", "[]", "{}"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)
    where = rule["annotations"]["runbook"]
    assert where.removeprefix(f"{runbook.FILE}#") in {*runbook.sections(), "{{ $labels.kind }}"}
    assert rule["labels"]["severity"] in {"warning", "critical"}


def test_a_metric_that_is_not_exported_would_be_noticed():
    assert "tidegate_ready" in exported()
    assert "tidegate_redy" not in exported()


def test_pointers_are_read_back():
    told = runbook.pointed("stuck", "support-desk: its last round got stuck (at train 3 of 20)")
    assert runbook.parted(told) == ("support-desk: its last round got stuck (at train 3 of 20)", "stuck")
    assert runbook.parted("nothing to see") == ("nothing to see", "")
    assert str(Alarm("registry", "", "no answer")).startswith("registry: ")
