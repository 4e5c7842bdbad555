"""Loading of a sharded state dict with megatron-core, from files that may be damaged or foreign.

megatron-core 0.19.2 reads `.metadata` with pickle.load, and what is no tensor (`rng/…`, `common_state/…`) with
torch.load(weights_only=False): whoever wrote the checkpoint could run code. Its readers are made by one function, which
is replaced here for the whole process: `.metadata` is read by `metadata_file`, and objects with weights_only=True.
"""

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from megatron_q3n.checkpoint.metadata_file import DAMAGE_ERRORS, read_metadata
from megatron_q3n.config import UserError
from megatron_q3n.parallel import Parallel

# numpy's random generator in checkpoints written before its numbers were saved as a list; the arrays are of numbers
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_NUMPY = [
    *((_RECONSTRUCT, f"{package}.multiarray._reconstruct") for package in ("numpy._core", "numpy.core")),
    *(np.ndarray, np.dtype, type(np.dtype(np.uint32))),
]


def load_sharded(template: dict[str, Any], checkpoint: Path, group: Parallel) -> dict[str, Any]:
    """Return the state dict that a sharded template describes, read from a verified checkpoint. A collective call.

    Raises: UserError on every process if one of them cannot read its part.
    """
    loaded: dict[str, Any] = {}
    problem = ""
    try:
        read_metadata(checkpoint)
        loaded = dist_checkpointing.load(template, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED)
    except UserError as error:
        problem = str(error)
    # torch gathers what its steps raise, as a BaseException
    except CheckpointException as error:
        causes = dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        problem = f"{checkpoint} cannot be read ({'; '.join(causes)}); use another checkpoint."
    except CheckpointingException as error:
        problem = f"{checkpoint} does not hold what this model needs ({error}); use another checkpoint."
    if group.any(bool(problem)):
        raise UserError(problem or f"{checkpoint} could not be read by another process; see its message.")
    return loaded


def load_plain(record: io.BytesIO) -> Any:
    """Return an object of plain values and tensors from a torch.save record; nothing else is constructed.

    Raises: UserError if the record is damaged or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(record, map_location="cpu", weights_only=True)
    except DAMAGE_ERRORS as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"an object holds more than plain values, or is damaged ({text})") from None


class PlainReader(FileSystemReader):
    """Reader of a checkpoint that unpickles plain values and tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's index of tensors."""
        return read_metadata(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned tensors and objects."""
        return super().read_data(plan, cast(LoadPlanner, _PlainObjects(planner)))


class _PlainObjects:
    """A load planner whose objects are read by `load_plain`."""

    def __init__(self, planner: LoadPlanner) -> None:
        assert isinstance(planner, DefaultLoadPlanner), planner
        self._planner = planner
        self.resolve_tensor, self.commit_tensor = planner.resolve_tensor, planner.commit_tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name, planner = read_item.dest_index.fqn, self._planner
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], load_plain(value))
        else:
            planner.state_dict[name] = load_plain(value)


def _plain_reader(checkpoint: str | Path, cache_metadata: bool = False, async_strategy: str = "mcore") -> PlainReader:
    """Replace megatron-core's function of the same arguments."""
    assert not cache_metadata, "megatron-core's cached reader unpickles anything"
    return PlainReader(checkpoint)


serialization._get_filesystem_reader = torch_strategy._get_filesystem_reader = _plain_reader
