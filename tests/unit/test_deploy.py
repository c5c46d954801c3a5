"""What is handed to other programs speaks of what there is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from proxy import metrics
from proxy.settings import Settings
from tests.support.pgbouncer import read_configuration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus-rules.yaml"


def test_alerts_are_about_metrics_that_exist() -> None:
    known = {
        *metrics.SCRAPED_GAUGES,
        *(
            metric._name  # noqa: SLF001
            for metric in vars(metrics).values()
            if hasattr(metric, "_documentation")
        ),
    }
    document: dict[str, Any] = yaml.safe_load(RULES.read_text())
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    assert {"TallygateAuditNotClean", "TallygateAuditFoundViolations"} <= {
        rule["alert"] for rule in rules
    }
    for rule in rules:
        assert rule["annotations"]["summary"]
        for name in re.findall(r"tallygate_\w+", rule["expr"]):
            assert name.removesuffix("_total") in known, name


def test_whatever_one_is_to_be_woken_for_has_an_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.partition("## What to be woken for")[2].partition("\n## ")[0]
    rules = RULES.read_text()
    conditions = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    wanted = {name for cell in conditions for name in re.findall(r"tallygate_\w+", cell)}
    assert len(wanted) > 8
    assert {name for name in wanted if name not in rules} == set()


def _known_settings() -> set[str]:
    names = {Settings.config_variable}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            names |= {f"TALLYGATE_{name}__{member}".upper() for member in section.model_fields}
        else:
            names.add(f"TALLYGATE_{name}".upper())
    return names


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_deployment_names_settings_that_exist(path: Path) -> None:
    named = set(re.findall(r"\bTALLYGATE_[A-Z_]+", path.read_text()))
    assert named <= _known_settings()
    # Nobody's registry but the reader's own.
    for image in re.findall(r"\bimage: *(\S+)", path.read_text()):
        assert "/" not in image


def _services() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document["services"]


def test_composed_replicas_differ_in_their_spools_alone() -> None:
    services = _services()
    first, second = services["tallygate-a"], services["tallygate-b"]
    assert {**first, "volumes": None} == {**second, "volumes": None}
    spools = {service["volumes"][-1] for service in (first, second)}
    assert spools == {"spool-a:/var/lib/tallygate", "spool-b:/var/lib/tallygate"}
    upstream = (DEPLOY / "nginx.conf").read_text()
    named = set(re.findall(r"^ +server ([\w-]+):4000", upstream, re.MULTILINE))
    assert named == {name for name in services if name.startswith("tallygate-")}


def test_replicas_are_given_the_time_to_settle() -> None:
    shutdown_s: int = Settings.model_fields["shutdown_timeout_s"].default
    replica = _services()["tallygate-a"]
    assert int(replica["stop_grace_period"].removesuffix("s")) > shutdown_s
    manifests: list[dict[str, Any]] = list(
        yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    )
    by_kind = {manifest["kind"]: manifest["spec"] for manifest in manifests}
    pod = by_kind["StatefulSet"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > shutdown_s
    # A spool of its own for each, which is kept; and what is asked for stands in it.
    (claim,) = by_kind["StatefulSet"]["volumeClaimTemplates"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == "/var/lib/tallygate"
    kept = by_kind["StatefulSet"]["persistentVolumeClaimRetentionPolicy"]
    assert set(kept.values()) == {"Retain"}


def test_pods_take_no_setting_from_the_name_of_a_service() -> None:
    manifests: list[dict[str, Any]] = list(
        yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    )
    pods = [each["spec"]["template"]["spec"] for each in manifests if "template" in each["spec"]]
    assert len(pods) == 2
    # Kubernetes would say TALLYGATE_PORT=tcp://… of the Service that stands in the same file.
    assert [pod.get("enableServiceLinks") for pod in pods] == [False, False]


def test_litellm_beside_the_replicas_is_as_the_doctor_wants_it() -> None:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "litellm.yaml").read_text())
    assert document["general_settings"]["always_include_stream_usage"]
    assert document["litellm_settings"]["include_cost_in_streaming_usage"]
    assert not document["litellm_settings"]["cache"]
    services = _services()
    keys = [model["litellm_params"]["api_key"] for model in document["model_list"]]
    named = {key.removeprefix("os.environ/") for key in keys}
    assert named <= services["litellm"]["environment"].keys()


def test_pooler_takes_transactions_and_throws_no_settings_away() -> None:
    pooler = read_configuration()["pgbouncer"]
    assert pooler["pool_mode"] == "transaction"
    ignored = {name.strip() for name in pooler["ignore_startup_parameters"].split(",")}
    # A client that asks for `options` must be refused: they would not be there.
    assert "options" not in ignored
