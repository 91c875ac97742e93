"""The page about metrics, the dashboard and the alert rules name the metrics that there are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from api.metrics.catalog import METRICS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "observability.md"
RUNBOOK = ROOT / "docs" / "operations.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "pocl.json"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
PROMETHEUS_METRICS = {"up": {"instance", "job"}}
"""Metrics that Prometheus itself makes of each scrape."""


def test_the_page_has_the_table_of_the_metrics() -> None:
    rows = re.findall(r"^\| `(pocl_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    listed = [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows]
    assert listed == [(metric.name, metric.type, metric.labels, metric.help) for metric in METRICS]


def test_names_keep_to_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.type == "counter"), metric.name
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.type == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def labels_by_sample() -> dict[str, set[str]]:
    """The labels that each sample of an exposition has, by its name as queries have it."""
    labels: dict[str, set[str]] = {**PROMETHEUS_METRICS}
    for metric in METRICS:
        series_labels = {"instance", "job", *metric.labels}
        if metric.type == "histogram":
            labels[f"{metric.name}_bucket"] = {"le", *series_labels}
            labels[f"{metric.name}_sum"] = labels[f"{metric.name}_count"] = series_labels
        else:
            labels[metric.name] = series_labels
    return labels


def rules() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Every query with where it stands; the variables of Grafana have a value."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$project", ".*")


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """The series that a query selects.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


@pytest.mark.parametrize(("place", "query"), sorted(queries()))
def test_queries_are_promql_over_metrics_and_labels_that_there_are(place: str, query: str) -> None:
    labels = labels_by_sample()
    found = selectors(query)
    assert found, place
    for selector in found:
        assert selector.name in labels, place
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels[selector.name], place
    # Every label by which something is grouped or matched belongs to a metric of the query.
    named = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query)
    grouped = {label.strip() for group in named for label in group.split(",")}
    assert grouped <= set().union(*(labels[str(selector.name)] for selector in found)), place


def test_a_query_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"."):
        selectors("sum by (le (pocl_jobs)")


def test_alerts_say_what_they_mean() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 10
    for rule in rules():
        assert re.fullmatch(r"Pocl[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        labels = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert labels <= set(re.findall(r"\w+", rule["expr"])), rule["alert"]


def test_every_alert_has_its_paragraph_in_the_runbook() -> None:
    page = RUNBOOK.read_text("utf-8")
    paragraphs = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(paragraphs) == [rule["alert"] for rule in rules()]
    for rule in rules():
        # What to do stands there, or behind a link.
        assert len(paragraphs[rule["alert"]]) > 40
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    used = {str(selector.name) for _, query in queries() for selector in selectors(query)}
    unused = [metric.name for metric in METRICS if not any(name.startswith(metric.name) for name in used)]
    assert unused == []


def test_panels_do_not_overlap_and_use_the_chosen_source() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]} == {"${datasource}"}
