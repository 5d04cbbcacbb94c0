"""cluster.yaml is what Ray's launcher accepts, and what its comments claim."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from segfleet.presets import training_preset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def _commands(cluster: dict[str, Any]) -> list[str]:
    return [command for key, value in cluster.items() if key.endswith("_commands") for command in value]


def test_ray_accepts_it_as_it_stands_and_filled_with_its_defaults(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(cluster["available_node_types"])


def test_ray_would_refuse_a_field_of_its_own_invention(cluster: dict[str, Any]) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        validate_config(prepare_config(cluster | {"nonsense": 1}))


def test_gpu_nodes_are_spot_and_come_and_go_while_the_head_stays(cluster: dict[str, Any]) -> None:
    nodes = dict(cluster["available_node_types"])
    head = nodes.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["GPU"] == 0
    for node in nodes.values():
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert node["min_workers"] == 0
        assert 0 < node["max_workers"] <= cluster["max_workers"]
        assert node["resources"]["GPU"] > 0
    assert 0 < cluster["idle_timeout_minutes"] <= 30


def test_the_gpu_nodes_hold_the_workers_of_the_published_recipe(cluster: dict[str, Any]) -> None:
    workers = training_preset("cityscapes_semseg_r50").workers
    node = cluster["available_node_types"]["gpu_worker"]
    per_node = min(node["resources"]["GPU"], node["resources"]["CPU"] // workers.cpus_per_worker)
    assert per_node * node["max_workers"] >= workers.num_workers


def test_every_node_has_a_given_security_group_since_rays_own_opens_ssh_to_the_world(
    cluster: dict[str, Any],
) -> None:
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"]
    assert "security_group" not in cluster["provider"]


def test_nothing_listens_to_the_world(cluster: dict[str, Any]) -> None:
    code = "\n".join(
        line.split(" #")[0]
        for line in (ROOT / "cluster.yaml").read_text().splitlines()
        if not line.lstrip().startswith("#")
    )
    assert "0.0.0.0" not in code
    assert "--allowed-hosts '*'" not in code
    assert "--disable-security-middleware" not in code
    (server,) = [command for command in _commands(cluster) if "mlflow server" in command]
    assert "--host $HEAD_IP" in server
    assert "--allowed-hosts $HEAD_IP:5000" in server


def test_ray_asks_for_the_token_and_its_dashboard_stays_on_the_head(cluster: dict[str, Any]) -> None:
    starts = [command for command in _commands(cluster) if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    (head,) = [command for command in starts if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_nodes_install_this_checkout_from_its_pins(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/segfleet"] == "."
    assert {".git", ".venv"} <= set(cluster["rsync_exclude"])
    (install,) = [command for command in cluster["setup_commands"] if "make install" in command]
    assert "-c constraints.txt" in install
    assert not [command for command in _commands(cluster) if "index-url" in command]
