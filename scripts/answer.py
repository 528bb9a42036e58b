"""Recomputes the report's first differences from the records, without the project's code: on CIFAR-10 at budget lite,
every KN against BN, both with statistics of 2 images, in points under moving statistics, paired by seed."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))  # setting, normalizer, seed
for file in (Path(__file__).parents[1] / "results" / "records").glob("*.json"):
    run = json.loads(file.read_text())
    config, budget = run["config"], run["config"]["budget"]
    length = config["dataset"]["name"], budget["name"], budget["epochs"]
    if length == ("cifar10", "lite", 12) and config["batch"]["stat_batch"] == 2:
        seed, norm = config.pop("seed"), config.pop("norm")
        found[json.dumps(config)][json.dumps(norm)][seed] = run["final"]["moving"]["accuracy"]
for setting, of in sorted(found.items()):
    config, bn = json.loads(setting), next((seeds for norm, seeds in of.items() if '"bn"' in norm), {})
    at = f"{config['arch']['name']}, {config['precision']}, rate {max(rate for _, rate in config['schedule']['lr'])}"
    for name, seeds in of.items():
        norm = json.loads(name)
        gain = f" from gain {norm['options']['gain']}" if norm["options"].get("gain") else ""
        gains = [accuracy - bn[seed] for seed, accuracy in seeds.items() if seed in bn]
        against = f", against BN {mean(gains):+.2f}" if gains else ""
        print(f"{at}: {norm['preset'] or norm['name']}{gain}: {mean(seeds.values()):.2f} (n = {len(seeds)}){against}")
