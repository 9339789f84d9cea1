"""TensorBoard logs of a training run: loss, learning rate, and held-out measures by position."""

from __future__ import annotations

from pathlib import Path

from dspark.training.trainer import Measures


class TrainLog:
    """Event files in a folder; those of a run that is gone on with continue the same curves."""

    def __init__(self, folder: Path, step: int) -> None:
        """`step`: what is logged from there on replaces what a cut run wrote."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step or None)

    def write(
        self, step: int, loss: float, learning_rate: float, measures: Measures | None
    ) -> None:
        """What one step brought."""
        self._writer.add_scalar("train/loss", loss, step)
        self._writer.add_scalar("train/learning_rate", learning_rate, step)
        if measures is None:
            return
        for kind, shares in (
            ("acceptance", measures.acceptance),
            ("agreement", measures.agreement),
        ):
            for position, share in enumerate(shares, start=1):
                self._writer.add_scalar(f"held_out/{kind}_{position}", share, step)
        self._writer.add_scalar("held_out/greedy_length", measures.greedy_length, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
