"""Scrapes of `/metrics`, read by the parser of Prometheus' own client."""

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient


def scrape(client: TestClient, **headers: str) -> dict[str, Family]:
    """The families of a scrape by their names."""
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value(families: dict[str, Family], sample: str, **labels: str) -> float | None:
    """The value of the sample with exactly these labels; None where there is none."""
    for family in families.values():
        for each in family.samples:
            if each.name == sample and each.labels == labels:
                return float(each.value)
    return None
