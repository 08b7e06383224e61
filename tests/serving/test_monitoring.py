"""examples/monitoring: its files parse and fit together, and the dashboard asks for what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import run_python

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
QUERIES = sorted({t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]})
LIKE_VLLM = {
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
}
"""What the server counts beside MAX's metrics."""


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def mounts(service: str) -> dict[str, str]:
    """Where a container finds this folder's files: their path in it, to their name here."""
    volumes = read("compose.yaml")["services"][service]["volumes"]
    parts = [volume.split(":") for volume in volumes if volume.startswith("./")]
    assert all(mode == "ro" for _, _, mode in parts)
    return {inside: name.removeprefix("./") for name, inside, _ in parts}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Every name that a server exports; a process of its own reads MAX's, as that sets globals."""
    catalogue = json.loads(
        run_python(
            "import json; from max.serve.telemetry._metrics_catalog import build_catalog;"
            "print(json.dumps([[metric.name, metric.type] for metric in build_catalog()]))"
        )
    )
    names = set(LIKE_VLLM)
    for name, kind in catalogue:
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + end for end in ends}
    return names


def test_every_file_here_is_used() -> None:
    mounted = set(mounts("prometheus").values()) | set(mounts("grafana").values())
    names = {path.name for path in FOLDER.iterdir()}
    assert names == mounted | {"README.md", "compose.yaml"}


def test_images_are_pinned_and_ports_are_this_machines() -> None:
    for service in read("compose.yaml")["services"].values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_prometheus_reads_a_server_on_the_host() -> None:
    (job,) = read("prometheus.yaml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (server,) = job["static_configs"]
    (address,) = server["targets"]
    host, _, port = address.partition(":")
    assert port == "8000"
    prometheus = read("compose.yaml")["services"]["prometheus"]
    assert prometheus["extra_hosts"] == [f"{host}:host-gateway"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = read("grafana-datasource.yaml")["datasources"]
    name, _, port = source["url"].removeprefix("http://").partition(":")
    services = read("compose.yaml")["services"]
    assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert (
        source["jsonData"]["timeInterval"] == read("prometheus.yaml")["global"]["scrape_interval"]
    )
    (provider,) = read("grafana-provider.yaml")["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert mounts("grafana")[home] == "grafana-dashboard.json"
    sources = {json.dumps(panel["datasource"]) for panel in DASHBOARD["panels"]} | {
        json.dumps(part["datasource"])
        for part in (
            *DASHBOARD["templating"]["list"],
            *(target for panel in DASHBOARD["panels"] for target in panel["targets"]),
        )
    }
    assert sources == {json.dumps({"type": source["type"], "uid": source["uid"]})}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
        taken |= cells


@pytest.mark.parametrize("query", QUERIES)
def test_query_names_only_what_is_exported(query: str, exported: set[str]) -> None:
    names = set(re.findall(r"\b(?:maxserve_|vllm:)\w+", query))
    assert names
    assert names <= exported
    assert query.count("(") == query.count(")")
    # A server alone has no label `replica`, which `.*` matches too.
    chosen = query.count('{instance=~"$instance",replica=~"$replica"')
    assert chosen == len(re.findall(r"\b(?:maxserve_|vllm:)\w+", query)), "of the chosen servers"


def test_lists_of_servers_and_replicas_come_from_an_exported_metric(exported: set[str]) -> None:
    definitions = {v["name"]: v["definition"] for v in DASHBOARD["templating"]["list"]}
    assert list(definitions) == ["instance", "replica"]
    for name, definition in definitions.items():
        asked = re.fullmatch(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", definition)
        assert asked is not None, definition
        metric, label = asked.groups()
        assert metric in exported
        assert label == name
    assert all(v["allValue"] == ".*" for v in DASHBOARD["templating"]["list"])


def test_all_counters_of_speculation_are_shown() -> None:
    assert {name for query in QUERIES for name in LIKE_VLLM if f"{name}{{" in query} == LIKE_VLLM
