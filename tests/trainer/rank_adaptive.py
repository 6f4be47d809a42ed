"""One rank of a run with an adaptive likelihood term under DDP, started by test_adaptive_nll.py."""

from __future__ import annotations

from pathlib import Path

from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOConfig, AdaptiveNLLDPOTrainer
from tests.trainer.rank_ddp import leave
from tests.trainer.rank_pairwise import train
from tests.trainer.test_pairwise_runs import entangled

STEPS = 4


def main(out: Path, kind: str, batch: int) -> None:
    trainer, moved = train(AdaptiveNLLDPOTrainer, AdaptiveNLLDPOConfig, out, kind, batch, data=entangled(), steps=STEPS)
    weights = [entry["nll_weight"] for entry in trainer.state.log_history if "nll_weight" in entry]
    leave(out, trainer.args.process_index, {"moved": moved, "weights": weights, "last": trainer.nll_weight})
