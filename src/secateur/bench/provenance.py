"""Where a table's numbers come from: versions, machines' kinds, times and work, summed over the nodes it rests on."""

from __future__ import annotations

import json
from collections import defaultdict

from .nodes import Graph
from .store import Store, read_result


def provenance(name: str, graph: Graph, store: Store) -> str:
    """Return JSON that stands beside a plan's table.

    Args:
        name: The plan's.
        graph: Its nodes.
        store: Where their results are; nodes without one are only counted.
    """
    known: dict[str, set[str]] = defaultdict(set)
    seconds: dict[str, float] = defaultdict(float)
    counts = {"nodes": len(graph.nodes), "done": 0, "retried": 0, "half_batch": 0}
    made, peaks = [], [0]
    for key, node in graph.nodes.items():
        if not store.done(key):
            continue
        result = read_result(store.folder(key))
        counts["done"] += 1
        counts["retried"] += result["attempt"] > 1
        counts["half_batch"] += result["batch_scale"] != 1
        known["secateur"].add(result["tool"]["version"])
        for fact in ("torch", "python", "platform"):
            known[fact].add(result["environment"][fact])
        known["device"].add(node.device)
        known["threads per node"].add(str(node.threads))
        seconds[node.stage] += result["cost"]["seconds"]
        made.append(result["created"])
        peaks.append(result["cost"]["peak_memory_bytes"])
    record = {
        "plan": name,
        **counts,
        "first": min(made, default=None),
        "last": max(made, default=None),
        "environment": {fact: ", ".join(sorted(values)) for fact, values in known.items()},
        "seconds_of_work": {stage: round(total) for stage, total in seconds.items()},
        "largest_peak_memory_mib": max(peaks) >> 20,
    }
    return json.dumps(record, indent=2) + "\n"
