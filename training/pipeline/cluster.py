"""A Ray cluster that is there already: the connection to it, and its nodes."""

import os
import socket

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.pipeline.crew import Node
from training.pipeline.weigh import GIB
from vla.errors import SimrealError

LOCAL, AUTO = "local", "auto"
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
PASSED = ("PYTHONPATH", "MUJOCO_GL")  # variables by which workers find code and graphics as this process does
REACH_S, ANSWER_S = 10.0, 120.0
REMEDY = (
    "Start it with `ray start --head` here and `ray start --address=HOST:PORT` on the others, and give the command on "
    "one of its nodes; cluster=local needs none."
)


class ClusterError(SimrealError):
    """There is no such cluster."""


def connect(address: str) -> list[Node]:
    """Join the cluster as a driver; its nodes."""
    if address != AUTO:
        _reach(address)
    # Ray hands out no GPU here, and would hide them all from whoever has asked for none.
    variables = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} | {k: os.environ[k] for k in PASSED if k in os.environ}
    try:
        ray.init(address=address, runtime_env={"env_vars": variables}, logging_level="ERROR")
    except Exception as error:  # whatever Ray's client raises
        raise ClusterError(f"cluster={address}: {error}", code="CLUSTER", remedy=REMEDY) from error
    return nodes()


def nodes() -> list[Node]:
    """Those that are alive: the head first, the others by address."""
    own = ray.get_runtime_context().get_node_id()
    found = [node for node in ray.nodes() if node["Alive"]]
    found.sort(key=lambda node: (HEAD not in node["Resources"], node["NodeManagerAddress"], node["NodeID"]))
    return [
        Node(
            node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)),
            frozenset(node["Resources"]), node["NodeID"] == own,
        )
        for node in found
    ]  # fmt: skip


def smallest_gpu(nodes: list[Node]) -> float | None:
    """GiB of the smallest GPU of these nodes of the cluster; None if they have none."""
    ask = ray.remote(_smallest_here)
    places = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes if node.gpus]
    futures = [ask.options(num_cpus=0, scheduling_strategy=place).remote() for place in places]
    try:
        return min(ray.get(futures, timeout=ANSWER_S), default=None)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a node does not tell the memory of its GPUs: {error}", code="CLUSTER",
            remedy="Look whether torch.cuda works there, or start all the same with force=true and a micro_batch.",
        ) from error  # fmt: skip


def _smallest_here() -> float:
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / GIB


def _reach(address: str) -> None:
    """Ray itself would wait for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ClusterError(f"cluster={address} is no address", code="CLUSTER", remedy="Write local, auto or HOST:PORT.")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise ClusterError(f"cluster={address} does not answer: {error}", code="CLUSTER", remedy=REMEDY) from error
