"""Runs in the job: starts the training, watches how it ends, and requeues the job or gives up, saying why.

    python3 -m slurm.supervise RUN_DIR/slurm/job.json

The batch script is replaced by this process. What it does with signals:

| signal | sent by | effect |
|---|---|---|
| USR1 | Slurm, before the time limit (--signal=B:USR1@…); a person | training saves and ends; job requeued |
| USR2 | a person: scancel --batch --signal=USR2 JOB | training saves and ends; job ends |
| TERM | Slurm, when it ends the job | wait; a job that still counts as running then is requeued |

On preemption Slurm sends TERM to the training's processes, not to this one; they save and end with 75. Outside a job
(`submit --local`) attempts follow each other here instead.

Three facts of Slurm shape this. `srun` must not be sent TERM, it would kill the step: the step is signalled by scancel.
A preempted batch script that ends with 0 counts as completed: the job requeues itself by scontrol. And requeueing
sends TERM to this very process and to what it is running, so TERM is ignored first.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slurm import progress

EXIT_BAD_INPUT, EXIT_NO_PROGRESS, EXIT_HANG, EXIT_REQUEUE = 2, 4, 70, 75
AGAIN = -1  # not an exit code: try once more
SIGNAL_AGAIN_SECONDS = 15.0


class Supervisor:
    """One run, on this allocation or machine."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.run_dir = Path(job["run_dir"])
        self.job_id = os.environ.get("SLURM_JOB_ID") if job["launcher"] != "local" else None
        self.asked: int | None = None
        self.ended_by_slurm = False
        self.steps_started = 0
        self.process: subprocess.Popen[bytes] | None = None

    def listen(self) -> None:
        """Take USR1, USR2 and TERM (and Ctrl-C, outside a job) as in the table above."""
        signal.signal(signal.SIGUSR1, self._save_and_end)
        signal.signal(signal.SIGUSR2, self._save_and_end)
        signal.signal(signal.SIGTERM, self._terminated)
        if self.job_id is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training, in our group, gets its own

    def attempt(self) -> int:
        """Make one attempt; return the exit code for the job, or AGAIN."""
        number = sum(line["event"] == "begin" for line in progress.attempts(self.run_dir)) + 1
        if progress.is_concluded(self.run_dir, self.job["steps"]):
            return self._end("done", 0, "nothing is left to do")
        fruitless = progress.fruitless_starts(self.run_dir)
        step = progress.newest_step(self.run_dir)
        if fruitless >= self.job["attempts_without_progress"]:
            return self._end(
                "gave up",
                EXIT_NO_PROGRESS,
                f"{fruitless} attempts in a row began at step {step} and none got further "
                "(attempts_without_progress); look at the first error in logs/, then submit --resume",
            )
        nodes = os.environ.get("SLURM_JOB_NODELIST", os.uname().nodename)
        progress.add_attempt_line(self.run_dir, event="begin", attempt=number, step=step, nodes=nodes, job=self.job_id)
        progress.tell(self.run_dir, f"attempt {number} begins at step {step} on {nodes}")
        progress.forget_outcome(self.run_dir)
        unfit, interrupted = self._preflight(number)
        if interrupted:
            return self._decide(interrupted)
        if unfit:
            return self._exclude(unfit)
        code = self._run(self._command(number))
        return self._decide(code)

    def _decide(self, code: int) -> int:
        """Say what follows from how the training ended."""
        outcome = progress.read_outcome(self.run_dir)
        if self.job["steps"] is None and "code" not in outcome and code in (0, EXIT_BAD_INPUT):
            progress.write_outcome(self.run_dir, code)
            outcome = {"code": code}
        said, message = outcome.get("code"), outcome.get("message", "")
        if said == 0:
            return self._end("done", 0, "finished")
        if said == EXIT_BAD_INPUT or code == EXIT_BAD_INPUT:
            return self._end("failed", EXIT_BAD_INPUT, message or "refused, see the log")
        if self.ended_by_slurm and self._state() != "RUNNING":
            return self._end("ended by Slurm", code or 1, "TERM received")
        reason = f"the training ended with code {code}"
        if said == EXIT_REQUEUE:
            reason = "saved and stopped early"
        elif code == EXIT_HANG:
            reason = "a rank hung: stacks of all ranks in logs/stacks/"
        elif code > 128:
            reason = f"a rank was ended by signal {code - 128}"
        if self.asked == signal.SIGUSR2:
            return self._end("stopped", EXIT_REQUEUE, f"{reason}, as asked (USR2)")
        if self.asked == signal.SIGUSR1:
            reason += ", the time limit is near"
        self._end("again", code, f"{reason}; to go on from step {progress.newest_step(self.run_dir)}")
        return AGAIN

    def _state(self) -> str:
        """Return what Slurm calls this job now: RUNNING, unless it is ending it (scancel, the limit, a requeue)."""
        command = ["squeue", "--noheader", f"--jobs={self.job_id}", "--format=%T"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def _end(self, decision: str, code: int, reason: str) -> int:
        step = progress.newest_step(self.run_dir)
        progress.add_attempt_line(self.run_dir, event="end", decision=decision, code=code, reason=reason, step=step)
        progress.tell(self.run_dir, f"{decision}: {reason}")
        return code

    def requeue(self, exclude: list[str] | None = None) -> int:
        """Put this job back into the queue, without some nodes; returns only if Slurm refuses."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the commands below
        assert self.job_id is not None
        commands = [["scontrol", "requeue", self.job_id]]
        if exclude:  # the list can be changed only while the job is not running
            update = f"ExcNodeList={','.join(exclude)}"
            commands = [
                ["scontrol", "requeuehold", self.job_id],
                ["scontrol", "update", f"JobId={self.job_id}", update],
                ["scontrol", "release", self.job_id],
            ]
        for command in commands:
            if subprocess.run(command).returncode:
                progress.tell(self.run_dir, f"{shlex.join(command)} failed: the job is not requeued")
                return EXIT_REQUEUE
        time.sleep(600)  # Slurm ends this process
        return EXIT_REQUEUE

    def _preflight(self, attempt: int) -> tuple[list[str], int]:
        """Check every node.

        Returns: the nodes that failed or did not answer; and a code above 128 if the check was ended from outside
            (preemption, say), which is no node's fault.
        """
        settings = self.job["preflight"]
        if settings is None or self.job_id is None:
            return [], 0
        folder = self.run_dir / progress.SLURM_FOLDER / "preflight" / f"attempt-{attempt:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        nodes = expand(os.environ["SLURM_JOB_NODELIST"])
        python, seconds = self.job["node_python"], settings["timeout_seconds"] + 60
        check = [python, "-m", "slurm.preflight", str(folder), json.dumps(settings)]
        began = time.monotonic()
        code = self._run(["srun", *self._shape(len(nodes), 1), *check], seconds)
        if code > 128 and time.monotonic() - began < seconds:
            return [], code
        return judge_nodes(folder, nodes, lambda text: progress.tell(self.run_dir, text)), 0

    def _exclude(self, unfit: list[str]) -> int:
        """Requeue the job without the nodes that are not fit, if that is not too many by now."""
        path = self.run_dir / progress.SLURM_FOLDER / progress.EXCLUDED
        known = path.read_text().split() if path.exists() else []
        excluded = sorted({*known, *unfit})
        if len(excluded) > self.job["max_excluded_nodes"]:
            return self._end("failed", 1, f"pre-flight: {', '.join(excluded)} are not fit (max_excluded_nodes)")
        path.write_text("\n".join(excluded) + "\n")
        self._end("again", 1, f"pre-flight failed on {', '.join(unfit)}: requeued without them")
        return self.requeue(excluded)

    def _command(self, attempt: int) -> list[str]:
        """Return the command line that starts every rank."""
        job, command = self.job, list(self.job["command"])
        if job["launcher"] == "local" or job["steps"] is None:
            return command if job["launcher"] == "local" else [*self._srun(1, 1), *command]
        first = job["master_address"] or expand(os.environ["SLURM_JOB_NODELIST"])[0]
        port = 15000 + (7 * int(self.job_id or 0) + 101 * attempt) % 15000
        os.environ.update(MASTER_ADDR=first, MASTER_PORT=str(port))
        if job["launcher"] == "srun":
            return [*self._srun(job["nodes"], job["processes_per_node"]), *command]
        return [*self._srun(job["nodes"], 1), "bash", "-c", self._torchrun(command)]

    def _torchrun(self, command: list[str]) -> str:
        """Return shell that starts torchrun and hands TERM to the workers, its children, who save.

        torchrun itself must not see it: it would kill them after 30 s. Where Slurm tracks processes by cgroup only
        this shell is told.
        """
        job, (python, *rest) = self.job, command
        run = (
            f"{shlex.join([python, '-m', 'torch.distributed.run'])} --nnodes={job['nodes']}"
            f" --nproc-per-node={job['processes_per_node']} --node-rank=$SLURM_NODEID"
            " --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT"
            f" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT {shlex.join(rest)}"
        )
        return (
            f"(trap '' TERM; exec {run}) & agent=$!; trap 'pkill -TERM -P $agent' TERM; "
            "while :; do wait $agent; code=$?; kill -0 $agent 2>/dev/null || exit $code; done"
        )

    def _srun(self, nodes: int, per_node: int) -> list[str]:
        fixed = ["--kill-on-bad-exit=1", "--label"]
        return ["srun", *self._shape(nodes, per_node), *fixed, *self.job["srun_arguments"]]

    def _shape(self, nodes: int, per_node: int) -> list[str]:
        tasks = nodes * per_node  # said outright: srun would take the job's number from its environment
        return [f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={per_node}"]

    def _run(self, command: list[str], seconds: float | None = None) -> int:
        """Run a command to its end, passing on what is asked of us; return its exit code, signals as 128 + n."""
        step, self.steps_started = self.steps_started, self.steps_started + 1
        ends_by = None if seconds is None else time.monotonic() + seconds
        process = self.process = subprocess.Popen(command, cwd=self.job["code"])
        signalled = 0.0
        while True:
            try:
                code = process.wait(timeout=0.5)
                self.process = None
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                pass
            if ends_by is not None and time.monotonic() > ends_by:
                self._signal("KILL", step)
            # more than once: a process that is still importing may miss the first
            if self.asked and time.monotonic() - signalled > SIGNAL_AGAIN_SECONDS:
                signalled = time.monotonic()
                self._signal("TERM", step)

    def _signal(self, name: str, step: int) -> None:
        """Signal the processes of a job step, or the one child there is without Slurm."""
        if self.job_id is not None:
            subprocess.run(["scancel", f"--signal={name}", f"{self.job_id}.{step}"])
        elif self.process is not None:
            self.process.send_signal(signal.Signals[f"SIG{name}"])

    def _save_and_end(self, number: int, _frame: Any) -> None:
        if self.asked != signal.SIGUSR2:  # whom a person told to end does not come back
            self.asked = number

    def _terminated(self, number: int, _frame: Any) -> None:
        if self.job_id is None:
            self.asked = signal.SIGUSR2
        else:
            self.ended_by_slurm = True


def judge_nodes(folder: Path, nodes: list[str], tell: Any) -> list[str]:
    """Read the pre-flight's reports and return the nodes to blame, having told why.

    A node that did not report, or has a problem of its own, is to blame. Where only the network between two
    good nodes failed, the one with more failed ends is; the first node, which runs this, only if no other is.
    """
    own, ends = [], dict.fromkeys(nodes, 0)
    for place, node in enumerate(nodes):
        path = folder / f"{node}.json"
        problems = json.loads(path.read_text())["problems"] if path.exists() else ["no report"]
        for problem in problems:
            tell(f"pre-flight {node}: {problem}")
            if problem.startswith("network: nothing came"):
                ends[node] += 1
            elif problem.startswith("network"):
                ends[node] += 1
                ends[nodes[(place + 1) % len(nodes)]] += 1
            elif node not in own:
                own.append(node)
    if own or not any(ends.values()):
        return own
    most = max(ends.values())
    worst = [node for node in nodes if ends[node] == most]
    return worst[1:] if len(worst) > 1 and worst[0] == nodes[0] else worst


def expand(nodelist: str) -> list[str]:
    """Return the names in Slurm's short form, n[1-3]."""
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main() -> int:
    """Supervise the run of the given job.json until it is done, given up, or requeued."""
    supervisor = Supervisor(json.loads(Path(sys.argv[1]).read_text()))
    os.environ.update(supervisor.job["environment"])
    supervisor.listen()
    code = supervisor.attempt()
    while code == AGAIN:
        code = supervisor.requeue() if supervisor.job_id is not None else supervisor.attempt()
    return code


if __name__ == "__main__":
    sys.exit(main())
