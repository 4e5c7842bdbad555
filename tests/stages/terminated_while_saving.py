"""Program of test_resume.py: a run that gets SIGTERM while an asynchronous checkpoint is written to a slow disk.

    python -m tests.stages.terminated_while_saving STEP <arguments of megatron_q3n.train>

STEP is the step of that checkpoint.
"""

import os
import signal
import sys
import time
from typing import Any

from megatron_q3n import train
from megatron_q3n.checkpoint import writer

# longer than several steps
WRITE_SECONDS = 2.0


def main() -> int:
    """Train, with a writer thread that sends SIGTERM to its own process."""
    step, write = int(sys.argv.pop(1)), writer._write

    def write_slowly(state: Any, save: Any, buckets: Any) -> None:
        if save.manifest_fields["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(WRITE_SECONDS)
        write(state, save, buckets)

    writer._write = write_slowly
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
