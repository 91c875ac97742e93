"""What the Helm chart promises, read from the objects that it renders for the values of deploy/helm/examples.

The rendered objects are committed: these tests need no Helm. Where its SDK and the schemas of Kubernetes are installed
(`make manifests` installs them in an environment of its own), the chart is rendered anew and checked too.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from api.health.routes import router as health_routes
from domain.environment import read_settings, refuse_unknown_variables
from domain.process_secrets import SECRET_VARIABLES
from domain.settings import Settings
from tests.support.compose_file import ROOT, ComposeFile
from tools import charts
from worker.settings import WorkerSettings

Object = dict[str, Any]
PODS = ("Deployment", "StatefulSet", "Job")
EXAMPLES = charts.example_names()


@cache
def all_objects(example: str) -> list[Object]:
    return [each for each in yaml.safe_load_all(charts.rendered_file(example).read_text(encoding="utf-8")) if each]


def objects(example: str, kind: str | None = None) -> list[Object]:
    return [each for each in all_objects(example) if kind in (None, each["kind"])]


def only(example: str, kind: str, ending: str = "") -> Object:
    (found,) = [each for each in objects(example, kind) if each["metadata"]["name"].endswith(ending)]
    return found


def workloads(example: str) -> list[Object]:
    return [each for each in objects(example) if each["kind"] in PODS]


WORKLOADS = [
    pytest.param(each, id=f"{example}-{each['metadata']['name']}")
    for example in EXAMPLES
    for each in workloads(example)
]


def pod_of(workload: Object) -> Object:
    pod: Object = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Object) -> Object:
    (container,) = pod_of(workload)["containers"]
    return dict(container)


def variables_of(workload: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container_of(workload)["env"]}


def values() -> Object:
    read: Object = yaml.safe_load((charts.CHART / "values.yaml").read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_committed_was_rendered_from_this_chart(example: str) -> None:
    assert charts.digest_of_rendered(example) == charts.digest_of_inputs(example), "run `make manifests`"


@pytest.mark.parametrize("example", EXAMPLES)
def test_helm_and_kubernetes_take_the_chart(example: str) -> None:
    pytest.importorskip("helm_python", reason="Helm's SDK is not installed: `make manifests` renders with it")
    pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes are not installed")
    text = charts.render(example)
    assert charts.rendered_file(example).read_text(encoding="utf-8").partition("\n")[2] == text
    assert charts.check(text) == len(objects(example))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_process_has_privileges(workload: Object) -> None:
    pod, container = pod_of(workload), container_of(workload)
    assert pod["automountServiceAccountToken"] is False
    # Variables of a service named pocl would be taken for settings.
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert [volume for volume in pod["volumes"] if "hostPath" in volume] == []


@pytest.mark.parametrize("workload", WORKLOADS)
def test_memory_is_bounded_and_images_are_of_one_version(workload: Object) -> None:
    container = container_of(workload)
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    assert re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", container["image"])
    # A volume of the node itself without a bound could fill it.
    assert all(volume["emptyDir"].get("sizeLimit") for volume in pod_of(workload)["volumes"] if "emptyDir" in volume)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_settings_are_known_and_valid_and_hold_no_secret(
    workload: Object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables = variables_of(workload)
    assert len(variables) == len(container_of(workload)["env"])
    assert not variables.keys() & {*SECRET_VARIABLES, "HF_TOKEN"}
    refuse_unknown_variables(Settings, WorkerSettings, environ=variables)
    (mounted,) = [volume["secret"] for volume in pod_of(workload)["volumes"] if volume["name"] == "secrets"]
    named = {value.removeprefix("/run/secrets/pocl/") for value in variables.values() if "/run/secrets/" in value}
    # Each pod has the keys that it reads, and no other.
    assert named == {item["path"] for item in mounted["items"]} == {item["key"] for item in mounted["items"]}
    contents = {"database-url": "postgresql://pocl:p@db/pocl", "redis-url": "redis://:p@redis/0"}
    for name in named:
        (tmp_path / name).write_text(contents.get(name, "a-secret-of-decent-length"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("/run/secrets/pocl", str(tmp_path)))
    assert read_settings(Settings).home == Path("/var/lib/pocl/home")
    read_settings(WorkerSettings)
    # A volume belongs to root, and a home that others may write to is refused: it must lie below.
    mounts = {mount["mountPath"] for mount in container_of(workload)["volumeMounts"]}
    assert "/var/lib/pocl" in mounts
    assert "/var/lib/pocl/home" not in mounts


@pytest.mark.parametrize("workload", WORKLOADS)
def test_volumes_and_mounts_agree(workload: Object) -> None:
    claims = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
    volumes = [volume["name"] for volume in pod_of(workload)["volumes"]]
    assert sorted([*volumes, *claims]) == sorted(mount["name"] for mount in container_of(workload)["volumeMounts"])
    made = {each["metadata"]["name"] for each in objects("small", "PersistentVolumeClaim")}
    claimed = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod_of(workload)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claimed <= made | {"models"}


def test_the_probes_ask_for_what_there_is() -> None:
    served = {route.path for route in health_routes.routes if hasattr(route, "path")}
    for example in EXAMPLES:
        api = container_of(only(example, "Deployment", "-api"))
        asked = {name: api[name]["httpGet"] for name in ("livenessProbe", "readinessProbe", "startupProbe")}
        assert {name: each["path"] for name, each in asked.items()} == {
            "livenessProbe": "/healthz",
            "readinessProbe": "/readyz",
            "startupProbe": "/healthz",
        }
        assert {each["path"] for each in asked.values()} <= served
        assert {each["port"] for each in asked.values()} == {api["ports"][0]["name"]}
        assert str(api["ports"][0]["containerPort"]) == variables_of(only(example, "Deployment", "-api"))["POCL_PORT"]
        for each in (only(example, "Deployment", "-scheduler"), *objects(example, "StatefulSet")):
            container = container_of(each)
            probe = container.get("livenessProbe") or container["readinessProbe"]
            assert probe["exec"]["command"][:3] == ["python", "-m", "worker.liveness"]
            assert probe["exec"]["command"][3] == variables_of(each)["POCL_WORKER_PULSE_FILE"]


def test_a_worker_is_not_started_again_for_its_silence_and_has_time_to_save() -> None:
    """Its main loop stands still while the broker is away, and its job goes on meanwhile."""
    compose = ComposeFile.load().services["worker"]
    for example in EXAMPLES:
        for worker in objects(example, "StatefulSet"):
            assert "livenessProbe" not in container_of(worker)
            grace = float(variables_of(worker)["POCL_WORKER_GRACE_SECONDS"])
            assert pod_of(worker)["terminationGracePeriodSeconds"] >= 2 * grace + 60
            if grace == float(compose.environment["POCL_WORKER_GRACE_SECONDS"]):
                assert pod_of(worker)["terminationGracePeriodSeconds"] >= compose.grace


def test_variables_out_of_a_secret_reach_the_pods_that_need_them() -> None:
    given = {}
    for each in workloads("large"):
        sources = container_of(each).get("envFrom", [])
        given[each["metadata"]["name"]] = [source["secretRef"]["name"] for source in sources]
    assert given.pop("pocl-scheduler") == ["pocl-s3", "pocl-trackers"]
    # The migration reads no artifact.
    assert given.pop("pocl-migration") == []
    assert set(map(tuple, given.values())) == {("pocl-s3",)}
    assert [each for each in workloads("small") if "envFrom" in container_of(each)] == []


def test_an_api_that_ends_is_first_taken_out_of_the_service() -> None:
    for example in EXAMPLES:
        api = only(example, "Deployment", "-api")
        (_, seconds) = container_of(api)["lifecycle"]["preStop"]["exec"]["command"]
        # Ten seconds for the requests under way, after that wait.
        assert pod_of(api)["terminationGracePeriodSeconds"] > float(seconds) + 10
        assert api["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_a_worker_asks_for_the_gpus_that_it_is_to_use() -> None:
    kinds = {}
    for each in objects("large", "StatefulSet"):
        resources = container_of(each)["resources"]
        asked = resources["limits"].get("nvidia.com/gpu", 0)
        assert resources["requests"].get("nvidia.com/gpu", 0) == asked
        kinds[each["metadata"]["name"]] = (asked, variables_of(each)["POCL_WORKER_DEVICE"])
    # The group `default` of the values stays beside those that are given.
    assert kinds == {"pocl-worker-default": (1, "cuda"), "pocl-worker-h100": (1, "cuda"), "pocl-worker-cpu": (0, "cpu")}
    # No other pod takes one.
    assert "nvidia.com/gpu" not in json.dumps(objects("large", "Deployment"))


def test_the_migration_comes_first_and_uses_nothing_of_the_release() -> None:
    for example in EXAMPLES:
        job = only(example, "Job")
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert container_of(job)["command"] == ["python", "-m", "api", "migrate"]
        assert pod_of(job)["restartPolicy"] == "Never"
        # At an installation the service account and the claim are not there yet.
        assert "serviceAccountName" not in pod_of(job)
        assert [volume for volume in pod_of(job)["volumes"] if "persistentVolumeClaim" in volume] == []
        assert container_of(job)["image"] == container_of(only(example, "Deployment", "-api"))["image"]


def test_the_chart_makes_no_secret() -> None:
    for example in EXAMPLES:
        assert objects(example, "Secret") == []
    schema = json.loads((charts.CHART / "values.schema.json").read_text(encoding="utf-8"))
    refused = set(schema["$defs"]["settings"]["propertyNames"]["not"]["enum"])
    assert set(SECRET_VARIABLES) <= refused


def test_pods_of_each_component_are_selected_by_labels_of_their_own() -> None:
    for example in EXAMPLES:
        selectors = []
        for workload in (*objects(example, "Deployment"), *objects(example, "StatefulSet")):
            labels = workload["spec"]["template"]["metadata"]["labels"]
            selector = workload["spec"]["selector"]["matchLabels"]
            assert selector.items() <= labels.items()
            selectors.append(selector)
        assert len({json.dumps(each, sort_keys=True) for each in selectors}) == len(selectors)
        budgets = [each["spec"]["selector"]["matchLabels"] for each in objects(example, "PodDisruptionBudget")]
        assert sorted(map(str, budgets)) == sorted(map(str, selectors))
        # A budget that allows nothing would keep nodes from being emptied.
        assert {each["spec"]["maxUnavailable"] for each in objects(example, "PodDisruptionBudget")} == {1}


def test_network_policies_let_through_what_is_needed_and_no_more() -> None:
    for example in EXAMPLES:
        policies = {each["metadata"]["name"]: each["spec"] for each in objects(example, "NetworkPolicy")}
        everything = policies["pocl-pods"]
        assert everything["policyTypes"] == ["Ingress", "Egress"]
        assert everything["ingress"] == []
        assert policies["pocl-api"]["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}]
        beyond = policies["pocl-broker-and-internet"]["podSelector"]["matchExpressions"][0]
        need_broker = {
            workload["metadata"]["labels"]["app.kubernetes.io/component"]
            for workload in workloads(example)
            if "POCL_REDIS_URL_FILE" in variables_of(workload)
        }
        assert set(beyond["values"]) == need_broker
        assert "api" not in need_broker


def test_an_ingress_passes_uploads_and_streams_on_as_they_come() -> None:
    ingress = only("large", "Ingress")
    annotations = {
        name.removeprefix("nginx.ingress.kubernetes.io/"): value
        for name, value in ingress["metadata"]["annotations"].items()
    }
    assert annotations["proxy-buffering"] == annotations["proxy-request-buffering"] == "off"
    api = variables_of(only("large", "Deployment", "-api"))
    assert annotations["proxy-body-size"] == "4g"
    assert int(api["POCL_MAX_UPLOAD_BYTES"]) == 4 * 1024**3
    assert float(annotations["proxy-read-timeout"]) > 2 * Settings().keep_alive_seconds
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["path"] == api["POCL_ROOT_PATH"] == "/pocl"
    assert values()["ingress"]["maxBodySize"] == "1g"
    assert Settings().max_upload_bytes == 1024**3


def test_alerts_and_dashboard_are_those_of_compose() -> None:
    copies = {file.name: file.read_bytes() for file in (charts.CHART / "files").iterdir()}
    assert copies == {name: source.read_bytes() for name, source in charts.COPIES.items()}, "run `make manifests`"
    rendered = only("large", "PrometheusRule")["spec"]["groups"]
    assert rendered == yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())["groups"]
    monitor = only("large", "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["path"] == "/metrics"
    # The alerts ask for the job by this name.
    service = only("large", "Service", "-api")
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "pocl"
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]


def test_the_values_keep_to_their_schema_and_no_other_name_is_taken() -> None:
    schema = json.loads((charts.CHART / "values.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    # Helm takes no list that names a thing twice.
    refused = schema["$defs"]["settings"]["propertyNames"]["not"]["enum"]
    assert len(set(refused)) == len(refused)
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(values())
    for example in EXAMPLES:
        validator.validate(yaml.safe_load((charts.EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8")))
    wrong: list[Object] = [
        {"api": {"replica": 2}},
        {"images": {"api": {"tag": "latest"}}},
        {"settings": {"POCL_API_KEY": "inline"}},
        {"workers": {"A_B": {}}},
        {"artifacts": {"objectStore": {"url": "s3://key:secret@bucket"}}},
        {"secrets": {"existingSecret": ""}},
    ]
    assert [each for each in wrong if validator.is_valid(each)] == []


def test_the_chart_has_the_version_of_the_service() -> None:
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert chart["appVersion"] == version
