"""Alerts, the dashboard and the guide name metrics and labels that exist, in expressions that Prometheus can read."""

import json
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
pytest.importorskip("promql_parser", reason="no wheel for this platform")

import promql_parser
from prometheus_client import CollectorRegistry
from test_metrics import Cache

from langchain_aegis.metrics import register_all

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import dashboard as written  # noqa: E402

RULES = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())
CONFIG = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.dgx-spark.yml").read_text())
DASHBOARD = json.loads((ROOT / "docker/grafana/dashboard.json").read_text())
GUIDE = (ROOT / "docs/monitoring.md").read_text()
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [
    *((rule["alert"], rule["expr"]) for rule in ALERTS),
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
]
# What Prometheus adds to a histogram and a counter.
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
ADDED = {"instance", "job", "le"}


def families():
    """Every family of the package with its labels, as a scrape shows it."""
    registry = CollectorRegistry()
    register_all(Cache(), servers=["http://127.0.0.1:9"], registry=registry)
    for collector in dict.fromkeys(registry._collector_to_names):
        for family in collector.describe():
            yield family.name, family.type, family.documentation, set(family._labelnames)


FAMILIES = {name: (kind, text, labels) for name, kind, text, labels in families()}
SERIES = {f"{name}{suffix}": labels for name, (kind, _, labels) in FAMILIES.items() for suffix in SUFFIXES[kind]}


def readable(expression):
    """Put something in place of what Grafana fills in."""
    return expression.replace("$__rate_interval", "5m")


def selectors(node):
    """All (metric, matched labels) of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        inner = getattr(node, name, None)
        for each in inner if isinstance(inner, list) else [inner]:
            if each is not None:
                yield from selectors(each)


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[w for w, _ in EXPRESSIONS])
def test_every_expression_can_be_read_and_names_what_exists(where, expression):
    found = list(selectors(promql_parser.parse(readable(expression))))
    assert found
    for metric, labels in found:
        assert metric in SERIES, f"{where}: no such metric {metric}"
        assert labels <= SERIES[metric] | ADDED, f"{where}: {metric} has no label {labels - SERIES[metric]}"
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
    assert grouped <= set.union(*(SERIES[metric] for metric, _ in found)) | ADDED, where


def test_the_reader_of_expressions_does_look():
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("rate(x[5m]")
    assert list(selectors(promql_parser.parse('sum by (a) (rate(x{b="1"}[5m])) / 2 > y'))) == [
        ("x", {"b"}),
        ("y", set()),
    ]


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_says_what_happened_and_what_to_do(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Aegis[A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    grouped = re.search(r"by \(([^)]*)\)", rule["expr"])
    (metric, _), *_ = selectors(promql_parser.parse(rule["expr"]))
    left = {label.strip() for label in grouped[1].split(",")} - {"le"} if grouped else SERIES[metric]
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert shown
    assert shown <= left, "a label that the result does not have would be empty"
    assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))


def test_the_alerts_that_were_asked_for_are_there():
    names = {rule["alert"] for rule in ALERTS}
    assert len(names) == len(ALERTS)
    assert {
        "AegisHitRateFell",
        "AegisAnswersSlow",
        "AegisPromptsDoNotFit",
        "AegisReloads",
        "AegisQueueNearlyFull",
    } <= names


def test_the_dashboard_is_what_its_program_writes():
    assert json.loads(written.text()) == DASHBOARD


def test_the_dashboard_s_panels_are_whole_and_do_not_overlap():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["legendFormat"] for target in panel["targets"])
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)


def test_the_dashboard_s_variables_are_filled_and_used():
    text = json.dumps(DASHBOARD["panels"])
    for variable in DASHBOARD["templating"]["list"]:
        assert f"${variable['name']}" in text or f"${{{variable['name']}}}" in text
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            assert label in SERIES[metric]
    used = set(re.findall(r"\$(?:\{(\w+)\}|(\w+))", text))
    named = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {a or b for a, b in used} <= {*named, "__rate_interval"}


def test_files_find_each_other_inside_the_containers():
    mounts = {
        target: ROOT / source
        for name in ("prometheus", "grafana")
        for source, target, _ in (v.split(":") for v in COMPOSE["services"][name]["volumes"] if v.startswith("./"))
    }
    assert (
        f"--config.file={next(t for t in mounts if t.endswith('prometheus.yml'))}"
        in COMPOSE["services"]["prometheus"]["command"]
    )
    assert set(CONFIG["rule_files"]) <= set(mounts)
    (aegis,) = (job for job in CONFIG["scrape_configs"] if job["job_name"] == "aegis")
    (files,) = aegis["file_sd_configs"]
    for path in files["files"]:
        assert all(set(group) == {"targets"} for group in yaml.safe_load(mounts[path].read_text()))
    (provider,) = yaml.safe_load((ROOT / "docker/grafana/dashboards.yml").read_text())["providers"]
    assert [t for t in mounts if t.startswith(provider["options"]["path"])]
    (source,) = yaml.safe_load((ROOT / "docker/grafana/datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(COMPOSE["services"]["prometheus"]["networks"]) & set(COMPOSE["services"]["grafana"]["networks"])


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_monitoring_starts_only_when_it_is_asked_for(name):
    assert COMPOSE["services"][name]["profiles"] == ["monitoring"]


def test_nobody_logs_in_to_grafana_and_nobody_may_change_it():
    environment = COMPOSE["services"]["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not any("PASSWORD" in name for name in environment)


def test_the_guide_lists_every_metric_with_its_labels_and_every_alert():
    rows = dict(re.findall(r"^\| `(aegis_\w+)` \| ([^|]*) \|", GUIDE, re.M))
    cache = {name for name in FAMILIES if name.startswith("aegis_cache_")}  # docs/cache.md has these
    expected = {
        f"{name}_total" if kind == "counter" else name: labels
        for name, (kind, _, labels) in FAMILIES.items()
        if name not in cache
    }
    assert set(rows) == set(expected)
    for name, labels in expected.items():
        assert {label.strip() for label in rows[name].split(",")} == labels, name
    assert set(re.findall(r"^\| (Aegis\w+) \|", GUIDE, re.M)) == {rule["alert"] for rule in ALERTS}


def test_the_guide_s_code_runs():
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    compile(block, "monitoring.md", "exec")
    assert "asgi_app(cache" in block
