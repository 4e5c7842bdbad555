"""Weight sync to rollout servers: a checkpoint of the trainer's weights, exported to a Hugging Face folder.

The folder appears complete, by a rename. The newest two are kept, because a server may still read the previous one.
"""

import shutil
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.conversion.exporting import Export, export_weights
from megatron_q3n.conversion.run_tokenizer import TokenizerSource
from megatron_q3n.hf import QWEN3_NEXT
from megatron_q3n.run_directory import TOKENIZER_FOLDER
from megatron_q3n.training.state import TrainState

NUM_KEPT = 2


class WeightSync:
    """Writer of weights to a folder that servers can read, by default `weight_sync` in the run directory."""

    def __init__(self, state: TrainState, run_dir: Path, folder: Path | None) -> None:
        self._state, self._run_dir = state, run_dir
        self._folder = folder or run_dir / "weight_sync"

    def __call__(self, version: int) -> Path:
        """Write the present weights and return their folder. A collective call."""
        group = self._state.parallel
        saved = checkpoint.save(self._state, self._folder / "saved")
        output = self._folder / f"version_{version:07d}"
        if group.is_leader:
            # a killed run may have left an incomplete one
            shutil.rmtree(output, ignore_errors=True)
            dtype = next(self._state.models[0].parameters()).dtype
            tokenizer = TokenizerSource(self._run_dir / TOKENIZER_FOLDER, is_chat_format=True)
            export = Export(saved, output, QWEN3_NEXT, dtype, tokenizer=tokenizer, verify="sizes")
            export_weights(export, _discard, _discard)
            for old in sorted(self._folder.glob("version_*"))[:-NUM_KEPT]:
                shutil.rmtree(old)
        group.barrier()
        return output


def _discard(*_: object) -> None:
    """Discard the export's messages: weights are exported every few seconds."""
