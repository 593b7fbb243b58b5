"""A real Ray cluster of two nodes on this machine, one CPU each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.bench.executors.ray import ENVIRONMENT, Ray

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Yield the cluster, this process connected to it; its workers can import what lies beside this file."""
    os.environ.update(ENVIRONMENT)
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([paths] if paths else [])])
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    connection = Ray(address=cluster.address)
    try:
        yield cluster
    finally:
        connection.close()
        cluster.shutdown()
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths
