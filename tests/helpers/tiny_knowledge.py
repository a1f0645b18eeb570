"""Prepared data, two cross-fitted LUMs and their knowledge, all small and made for real."""

from pathlib import Path

from lumrec.experiments.config import load
from lumrec.stages.registry import STAGES

WORDS = [
    "name=tiny",
    "data.source=simulator",
    "data.simulator.num_users=60",
    "data.simulator.num_items=120",
    "data.simulator.events_per_user=30",
    "model.dim=16",
    "model.max_events=16",
    "pretrain.train.max_steps=4",
    "pretrain.packing.events_per_pack=256",
]


def make_knowledge(runs: Path, *words: str) -> list[str]:
    """Words of the runs folder `runs`, which now holds tiny-prepare, tiny-pretrain-kof2 and tiny-query."""
    all_words = [*WORDS, *words, f"runs_dir={runs}"]
    for fold in ("0/2", "1/2"):
        STAGES["pretrain"].run(load(None, [*all_words, f"fold={fold}"]))
    STAGES["query"].run(load(None, [*all_words, "inputs.lums=[tiny-pretrain-0of2, tiny-pretrain-1of2]"]))
    return all_words
