"""What is handed to other programs speaks of what there is."""

import re
from pathlib import Path
from typing import Any

import yaml

from proxy import metrics

RULES = Path(__file__).parents[2] / "deploy" / "prometheus-rules.yaml"


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
