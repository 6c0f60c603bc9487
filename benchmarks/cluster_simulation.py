"""What more workers do to calibration, from measured costs: where the time goes, what limits it.

    python -m benchmarks.cluster_cost MODEL.onnx --data DATA --skip-times --costs costs.json
    python -m benchmarks.cluster_simulation costs.json [--workers 1,2,8,64,1000]
        [--texts 1000000] [--weights 2e9]

Simulates ``DaskWorkers.map`` item by item, for a stream of --texts texts through the measured
model, and for 2,000 texts through an encoder of --weights weights: the client prepares shards and
merges answers one after the other, its network carries one thing at a time in each direction,
workers compute, and merge answers of neighbours where there are many of them. The larger encoder is
scaled from the measured one: compute and model by weights, observers by the number of channels of
all layers. Nothing here was run on so many machines.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qcompile.calibration.row_sample import ROWS, likely_rows
from qcompile.compiler.cluster.groups import group_size

_WINDOW = 2  # items at a worker: dask_workers.py


@dataclass(frozen=True)
class Costs:
    """Of calibration of one model, measured: seconds on one core, and bytes.

    Attributes:
        feeds: in a shard, of ``texts`` texts each.
        prepare: read, tokenize and pickle a shard, in the client.
        observe: run the feeds of a shard, in a worker.
        merge: what a worker returned, in the client.
        open: load the model, in a worker.
        sent: bytes of a shard.
        ranges: bytes of observers that a shard returns, without samples of channels.
        sample: bytes of the samples of channels that calibration keeps.
        model: bytes of the model.
        weights: of the model that was measured, without tables.
    """

    feeds: int
    texts: int
    prepare: float
    observe: float
    merge: float
    open: float
    sent: float
    ranges: float
    sample: float
    model: float
    weights: float

    def of_larger(self, weights: float) -> Costs:
        """Scaled to an encoder of so many weights, wider and deeper alike.

        Weights grow with the cube of the scale (two of width, one of depth), channels of all layers
        with its square.
        """
        more = weights / self.weights
        wider = more ** (2 / 3)
        return replace(
            self,
            observe=self.observe * more,
            open=self.open * more,
            model=self.model * more,
            merge=self.merge * wider,
            ranges=self.ranges * wider,
            sample=self.sample * wider,
            weights=weights,
        )


@dataclass(frozen=True)
class Network:
    """Bytes per second of the client, and of the storage that all workers read models from."""

    client: float = 1.25e9
    storage: float = 2.5e9


@dataclass(frozen=True)
class Outcome:
    """Seconds in all, and the share of them in which workers (on average), the client and its
    network were busy; ``loading``: until a worker has the model."""

    seconds: float
    workers: float
    client: float
    network: float
    loading: float

    @property
    def limit(self) -> str:
        """What was busy the longest share of the time."""
        shares = {"workers": self.workers, "client": self.client, "network": self.network}
        shares["loading the model"] = self.loading / self.seconds
        return max(shares, key=lambda name: shares[name])


def _sent_rows(share: float) -> float:
    """How many rows a share of the data sends, over those of a sample."""
    return min(1.0, likely_rows(share) / ROWS)


def simulate(
    costs: Costs, network: Network, texts: int, workers: int, *, group: int = 1
) -> Outcome:
    """Calibration of so many texts by so many workers.

    group: shards whose answers workers merge into one, each of them twice on its way up a tree.
    """
    shards = math.ceil(texts / (costs.feeds * costs.texts))
    loading = workers * costs.model / network.storage + costs.open
    work = costs.observe + (2 * costs.merge if group > 1 else 0.0)
    free = [loading] * workers  # when each worker is free
    client = out = back = 0.0  # when client and both directions of its network are free
    busy_client = busy_network = 0.0
    waiting: deque[float] = deque()  # when answers are here, in the order of the items
    for first in range(0, shards, group):
        count = min(group, shards - first)
        if len(waiting) * group >= _WINDOW * workers:
            client = max(client, waiting.popleft()) + costs.merge
        last = 0.0
        for _ in range(count):
            client += costs.prepare
            out = max(out, client) + costs.sent / network.client
            ended = max(heapq.heappop(free), out) + work
            heapq.heappush(free, ended)
            last = max(last, ended)
        answer = costs.ranges + costs.sample * _sent_rows(count / shards)
        back = max(back, last) + answer / network.client
        waiting.append(back)
        busy_client += count * costs.prepare + costs.merge
        busy_network += (count * costs.sent + answer) / network.client
    for arrived in waiting:
        client = max(client, arrived) + costs.merge
    return Outcome(
        client,
        shards * work / workers / client,
        busy_client / client,
        busy_network / client,
        loading,
    )


def table(costs: Costs, network: Network, texts: int, counts: list[int]) -> str:
    """A row for each number of workers."""
    lines = [
        "| workers | seconds | times faster | workers busy | client busy | network busy | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = simulate(costs, network, texts, 1).seconds
    for count in counts:
        found = simulate(costs, network, texts, count, group=group_size(count))
        shares = " | ".join(f"{s:.0%}" for s in (found.workers, found.client, found.network))
        speed = f"{found.seconds:,.0f} | {alone / found.seconds:.1f}"
        lines.append(f"| {count:,} | {speed} | {shares} | {found.limit} |")
    return "\n".join(lines)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("costs", type=Path, help="as benchmarks.cluster_cost --costs writes them")
    parser.add_argument("--workers", default="1,2,8,64,1000")
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--weights", type=float, default=2e9)
    args = parser.parse_args()
    costs, network = Costs(**json.loads(args.costs.read_text(encoding="utf-8"))), Network()
    counts = [int(count) for count in args.workers.split(",")]
    print(f"{args.texts:,} texts, the measured model:", table(costs, network, args.texts, counts),
          sep="\n\n")  # fmt: skip
    larger = costs.of_larger(args.weights)
    print(f"\n2,000 texts, {args.weights:,.0f} weights:", table(larger, network, 2000, counts),
          sep="\n\n")  # fmt: skip
    shown = {name: f"{value:.4g}" for name, value in asdict(costs).items()}
    print(f"\nmeasured: {shown}; assumed: {asdict(network)}")


if __name__ == "__main__":
    main()
