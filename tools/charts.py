"""Render the Helm chart with the values of deploy/helm/examples, and check what comes out against Kubernetes' schemas.

`make manifests` runs it, after each change of the chart, in an environment of its own with Helm's SDK and the schemas.
The results are committed, so that the tests which read them need neither.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "pocl"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
COPIES = {
    "rules.yml": ROOT / "deploy" / "prometheus" / "rules.yml",
    "dashboard.json": ROOT / "deploy" / "grafana" / "dashboards" / "pocl.json",
}
"""What the chart has of compose, by its name below `files`. Links would not survive every way of copying a tree."""
KUBERNETES_VERSIONS = ("1.27", "1.31", "1.37")
"""The oldest that the chart takes, one between, and the newest that there are schemas of."""
_OPERATOR = "monitoring.coreos.com/"
_TITLE = "# Made by `make manifests` of the chart and the values with the digest "


def example_names() -> list[str]:
    """The names of the examples."""
    return sorted(file.stem for file in EXAMPLES.glob("*.yaml") if not file.name.endswith(".rendered.yaml"))


def rendered_file(name: str) -> Path:
    """Where the rendered objects of an example are."""
    return EXAMPLES / f"{name}.rendered.yaml"


def digest_of_inputs(name: str) -> str:
    """SHA-256 over the chart and the values of an example."""
    files = sorted(file for file in CHART.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in (*files, EXAMPLES / f"{name}.yaml"):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def digest_of_rendered(name: str) -> str:
    """The digest of the inputs that the rendered objects were made of."""
    return rendered_file(name).read_text(encoding="utf-8").splitlines()[0].removeprefix(_TITLE)


def render(name: str) -> str:
    """The objects of an example, as Helm renders them for a release `pocl` in the namespace `pocl`.

    Raises:
        HelmError: the chart is wrong, or the values do not keep to its schema.
    """
    import helm_python

    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    with helm_python.Chart.load(str(CHART)) as chart:
        files: dict[str, str] = chart.render(values, name="pocl", namespace="pocl")
    documents = [f"---\n# Source: {file}\n{files[file].strip()}\n" for file in sorted(files) if files[file].strip()]
    return "".join(document for document in documents if "NOTES.txt" not in document.splitlines()[1])


def check(text: str) -> int:
    """Check objects against the schemas of each of :data:`KUBERNETES_VERSIONS`, unknown fields included; their number.

    Raises:
        ValidationError: an object is wrong.
    """
    import kubernetes_validate

    objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(text) if each]
    for each in objects:
        # Of the Prometheus operator there is no schema.
        if not each["apiVersion"].startswith(_OPERATOR):
            for version in KUBERNETES_VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)
    return len(objects)


def main() -> None:
    """Write what the chart has of compose, and the rendered objects of every example."""
    for name, source in COPIES.items():
        shutil.copyfile(source, CHART / "files" / name)
    for name in example_names():
        text = render(name)
        print(f"{name}: {check(text)} objects")
        rendered_file(name).write_text(f"{_TITLE}{digest_of_inputs(name)}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
