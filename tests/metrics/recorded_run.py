"""Fake training loop, run as a separate process so that a test can kill it.

    python recorded_run.py RUN_DIR FIRST_STEP LAST_STEP [kill_after=K] [total=N] [pause=SECONDS] [spike=K] …

Metrics are a function of the step. Every fifth step completes a checkpoint and writes the expert load. A further option
is `wandb.mode=MODE`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_q3n.config import UserError, validate
from megatron_q3n.metrics import Recorder


def main() -> None:
    run_dir, first_step, last_step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = dict(argument.split("=") for argument in sys.argv[4:])
    logging = {"interval_steps": 10, "wandb": {"mode": options.get("wandb.mode", "auto")}}
    config = validate({"logging": logging, "training": {"steps": 1000}})
    recorder = Recorder(run_dir, config, first_step=first_step, total_steps=int(options.get("total", 30)), enabled=True)
    for step in range(first_step, last_step + 1):
        values = {"tokens": 1024 * step, "loss/train": 6 / step, "loss/mtp_1": 7 / step}
        if step == int(options.get("spike", 0)):
            values["loss/train"] = 90.0
        if step % 5 == 0:
            layers = [{"name": "layer 0", "share": [0.75, 0.25]}]
            load = json.dumps({"step": step, "layers": layers})
            (run_dir / "expert_load.json").write_text(load)
        recorder.log(step, values | ({"loss/validation": 5 / step} if step % 5 == 0 else {}))
        if step % 5 == 0:
            recorder.checkpointed(step)
        if step == int(options.get("kill_after", 0)):
            time.sleep(float(options.get("pause", 0)))
            os.kill(os.getpid(), signal.SIGKILL)
    recorder.close("done")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"UserError: {error}")
