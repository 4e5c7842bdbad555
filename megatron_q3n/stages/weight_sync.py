"""New weights for rollout servers: a checkpoint of the present state, exported to a Hugging Face folder.

The folder appears whole, by a rename; the one before the last is deleted, when no server reads it any more.
"""

import shutil
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.hf import QWEN3_NEXT
from megatron_q3n.run_directory import TOKENIZER_FOLDER
from megatron_q3n.training.state import TrainState

KEPT = 2


class Publisher:
    """Writes weights where servers see them."""

    def __init__(self, state: TrainState, run_dir: Path, folder: Path | None) -> None:
        self._state, self._run_dir = state, run_dir
        self._folder = folder or run_dir / "handover"

    def __call__(self, version: int) -> Path:
        """Write the present weights and return their folder. A collective call."""
        group = self._state.parallel
        saved = checkpoint.save(self._state, self._folder / "saved")
        output = self._folder / f"version_{version:07d}"
        if group.is_leader:
            shutil.rmtree(output, ignore_errors=True)  # of a run that was killed here
            dtype = next(self._state.models[0].parameters()).dtype
            tokenizer = self._run_dir / TOKENIZER_FOLDER
            export = Export(saved, output, QWEN3_NEXT, dtype, tokenizer=tokenizer, verify="sizes")
            export_weights(export, _silent, _silent)
            for old in sorted(self._folder.glob("version_*"))[:-KEPT]:
                shutil.rmtree(old)
        group.barrier()
        return output


def _silent(*_: object) -> None:
    """Say nothing: there are new weights every few seconds."""
