"""Not a test: a run that gets SIGTERM while a checkpoint is being written behind the training, and its disk is slow.

    python -m tests.stages.told_while_saving STEP <arguments of megatron_q3n.train>

STEP says which checkpoint.
"""

import os
import signal
import sys
import time
from typing import Any

from megatron_q3n import train
from megatron_q3n.checkpoint import writer

WRITING_SECONDS = 2.0  # several steps


def main() -> int:
    """Train, with a writing thread that tells its own process to end."""
    step, write = int(sys.argv.pop(1)), writer._write

    def slowly(state: Any, save: Any, buckets: Any) -> None:
        if save.description["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(WRITING_SECONDS)
        write(state, save, buckets)

    writer._write = slowly
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
