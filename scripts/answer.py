"""Prints the report's first differences again, from the records and nothing of the project: on CIFAR-10 at budget lite,
each preset of KN against BN, both with statistics of 2 images, in points under moving statistics, seed by seed."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
for file in (Path(__file__).parents[1] / "results" / "records").glob("*.json"):
    run = json.loads(file.read_text())
    of = {group: run["config"][group] for group in ("dataset", "budget", "norm", "arch", "batch")}
    length = (of["budget"]["name"], of["budget"]["epochs"], of["budget"]["warmup"])
    if of["dataset"]["name"] == "cifar10" and length == ("lite", 12, 2) and of["batch"]["stat_batch"] == 2:
        row = of["arch"]["name"], of["norm"]["preset"] or of["norm"]["name"]
        found[row][run["config"]["seed"]] = run["final"]["moving"]["accuracy"]
for (network, kind), seeds in sorted(found.items()):
    against = found[network, "bn"]
    gains = [accuracy - against[seed] for seed, accuracy in seeds.items() if seed in against]
    print(f"{network} {kind}: {mean(seeds.values()):.2f} (n = {len(seeds)}), against BN {mean(gains):+.2f}")
