"""Supervisor in the Slurm job: starts the training, and requeues the job or gives up when the training has ended.

    python3 -m slurm.supervise RUN_DIR/slurm/job.json

This process replaces the batch script (exec). Signals:

| signal | sent by | effect |
|---|---|---|
| USR1 | Slurm, before the time limit (--signal=B:USR1@…), or a user | training saves and exits; the job is requeued |
| USR2 | a user: scancel --batch --signal=USR2 JOB | training saves and exits; the job ends |
| TERM | Slurm, when it ends the job | wait for the training; requeue if the job is still RUNNING afterwards |

On preemption Slurm sends TERM to the training processes, not to this one; they save and exit with 75. Outside a job
(`submit --local`) attempts run in a loop in this process instead.

Three properties of Slurm determine the implementation. `srun` must not receive TERM, because it would kill the step;
the step is signalled with scancel. A preempted batch script that exits with 0 counts as completed, so the job requeues
itself with scontrol. Requeueing sends TERM to this process and its children, so TERM is ignored first.
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
# not an exit code: start another attempt
RETRY = -1
RESEND_SIGNAL_SECONDS = 15.0


class Supervisor:
    """Supervisor of one run, in a Slurm allocation or on this machine."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.run_dir = Path(job["run_dir"])
        self.job_id = os.environ.get("SLURM_JOB_ID") if job["launcher"] != "local" else None
        self.requested_signal: int | None = None
        self.received_sigterm = False
        self.steps_started = 0
        self.process: subprocess.Popen[bytes] | None = None

    def install_signal_handlers(self) -> None:
        """Handle USR1, USR2 and TERM as in the table above; ignore Ctrl-C outside a job."""
        signal.signal(signal.SIGUSR1, self._save_and_end)
        signal.signal(signal.SIGUSR2, self._save_and_end)
        signal.signal(signal.SIGTERM, self._terminated)
        # the training is in the same process group and receives Ctrl-C itself
        if self.job_id is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def attempt(self) -> int:
        """Run one attempt; return the exit code of the job, or RETRY."""
        number = sum(line["event"] == "begin" for line in progress.attempts(self.run_dir)) + 1
        if progress.is_concluded(self.run_dir, self.job["steps"]):
            return self._end("done", 0, "nothing is left to do")
        without_progress = progress.count_attempts_without_progress(self.run_dir)
        step = progress.newest_step(self.run_dir)
        if without_progress >= self.job["attempts_without_progress"]:
            return self._end(
                "gave up",
                EXIT_NO_PROGRESS,
                f"{without_progress} attempts in a row began at step {step} without progress "
                "(attempts_without_progress); see the first error in logs/, then submit --resume",
            )
        nodes = os.environ.get("SLURM_JOB_NODELIST", os.uname().nodename)
        progress.add_attempt_line(self.run_dir, event="begin", attempt=number, step=step, nodes=nodes, job=self.job_id)
        progress.log_event(self.run_dir, f"attempt {number} begins at step {step} on {nodes}")
        progress.delete_outcome(self.run_dir)
        unfit, interrupted = self._preflight(number)
        if interrupted:
            return self._decide(interrupted)
        if unfit:
            return self._exclude(unfit)
        code = self._run(self._command(number))
        return self._decide(code)

    def _decide(self, code: int) -> int:
        """Record how the training ended; return the exit code of the job, or RETRY."""
        outcome = progress.read_outcome(self.run_dir)
        if self.job["steps"] is None and "code" not in outcome and code in (0, EXIT_BAD_INPUT):
            progress.write_outcome(self.run_dir, code)
            outcome = {"code": code}
        outcome_code, message = outcome.get("code"), outcome.get("message", "")
        if outcome_code == 0:
            return self._end("done", 0, "finished")
        if outcome_code == EXIT_BAD_INPUT or code == EXIT_BAD_INPUT:
            return self._end("failed", EXIT_BAD_INPUT, message or "rejected, see the log")
        if self.received_sigterm and self._state() != "RUNNING":
            return self._end("ended by Slurm", code or 1, "TERM received")
        reason = f"the training ended with code {code}"
        if outcome_code == EXIT_REQUEUE:
            reason = "saved and stopped early"
        elif code == EXIT_HANG:
            reason = "a rank hung: stacks of all ranks in logs/stacks/"
        elif code > 128:
            reason = f"a rank was ended by signal {code - 128}"
        if self.requested_signal == signal.SIGUSR2:
            return self._end("stopped", EXIT_REQUEUE, f"{reason}, on request (USR2)")
        if self.requested_signal == signal.SIGUSR1:
            reason += ", the time limit is near"
        self._end("again", code, f"{reason}; to resume from step {progress.newest_step(self.run_dir)}")
        return RETRY

    def _state(self) -> str:
        """Return the Slurm state of this job: RUNNING, unless Slurm is ending it (scancel, time limit, requeue)."""
        command = ["squeue", "--noheader", f"--jobs={self.job_id}", "--format=%T"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def _end(self, decision: str, code: int, reason: str) -> int:
        step = progress.newest_step(self.run_dir)
        progress.add_attempt_line(self.run_dir, event="end", decision=decision, code=code, reason=reason, step=step)
        progress.log_event(self.run_dir, f"{decision}: {reason}")
        return code

    def requeue(self, exclude: list[str] | None = None) -> int:
        """Requeue this job, optionally without some nodes; return only if Slurm rejects the request."""
        # inherited by the commands below
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert self.job_id is not None
        commands = [["scontrol", "requeue", self.job_id]]
        # the list of excluded nodes can only be changed while the job is not running
        if exclude:
            update = f"ExcNodeList={','.join(exclude)}"
            commands = [
                ["scontrol", "requeuehold", self.job_id],
                ["scontrol", "update", f"JobId={self.job_id}", update],
                ["scontrol", "release", self.job_id],
            ]
        for command in commands:
            if subprocess.run(command).returncode:
                progress.log_event(self.run_dir, f"{shlex.join(command)} failed: the job is not requeued")
                return EXIT_REQUEUE
        # until Slurm ends this process
        time.sleep(600)
        return EXIT_REQUEUE

    def _preflight(self, attempt: int) -> tuple[list[str], int]:
        """Run the pre-flight check on every node.

        Returns: the nodes that failed or did not report; and a code above 128 if the check was interrupted by a signal
            (e.g. preemption), in which case no node is excluded.
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
        return find_unfit_nodes(folder, nodes, lambda text: progress.log_event(self.run_dir, text)), 0

    def _exclude(self, unfit: list[str]) -> int:
        """Requeue the job without the unfit nodes, or fail if they exceed max_excluded_nodes."""
        path = self.run_dir / progress.SLURM_FOLDER / progress.EXCLUDED
        previous = path.read_text().split() if path.exists() else []
        excluded = sorted({*previous, *unfit})
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
        """Return a shell command that starts torchrun and forwards TERM to its children, the workers, which then save.

        torchrun itself must not receive TERM, because it would kill the workers after 30 s. If Slurm tracks processes
        by cgroup, only this shell receives the signal.
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
        # explicit, because srun would take --ntasks of the job from its environment
        tasks = nodes * per_node
        return [f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={per_node}"]

    def _run(self, command: list[str], seconds: float | None = None) -> int:
        """Run a command to its end, forwarding requested signals; return its exit code, 128 + n for signal n."""
        step, self.steps_started = self.steps_started, self.steps_started + 1
        deadline = None if seconds is None else time.monotonic() + seconds
        process = self.process = subprocess.Popen(command, cwd=self.job["code"])
        signalled = 0.0
        while True:
            try:
                code = process.wait(timeout=0.5)
                self.process = None
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                pass
            if deadline is not None and time.monotonic() > deadline:
                self._signal("KILL", step)
            # repeated, because a process that is still importing may miss the first signal
            if self.requested_signal and time.monotonic() - signalled > RESEND_SIGNAL_SECONDS:
                signalled = time.monotonic()
                self._signal("TERM", step)

    def _signal(self, name: str, step: int) -> None:
        """Send a signal to the processes of a job step, or without Slurm to the child process."""
        if self.job_id is not None:
            subprocess.run(["scancel", f"--signal={name}", f"{self.job_id}.{step}"])
        elif self.process is not None:
            self.process.send_signal(signal.Signals[f"SIG{name}"])

    def _save_and_end(self, number: int, _frame: Any) -> None:
        # USR2 (end without requeue) takes precedence over a later USR1
        if self.requested_signal != signal.SIGUSR2:
            self.requested_signal = number

    def _terminated(self, number: int, _frame: Any) -> None:
        if self.job_id is None:
            self.requested_signal = signal.SIGUSR2
        else:
            self.received_sigterm = True


def find_unfit_nodes(folder: Path, nodes: list[str], log_event: Any) -> list[str]:
    """Read the pre-flight reports, log their problems, and return the nodes to exclude.

    A node without a report or with a local problem is unfit. If only network connections failed, the nodes with the
    most failed connections are unfit; the first node, which runs the supervisor, only if it is the only one.
    """
    unfit, failed_connections = [], dict.fromkeys(nodes, 0)
    for index, node in enumerate(nodes):
        path = folder / f"{node}.json"
        problems = json.loads(path.read_text())["problems"] if path.exists() else ["no report"]
        for problem in problems:
            log_event(f"pre-flight {node}: {problem}")
            if problem.startswith("network: nothing received"):
                failed_connections[node] += 1
            elif problem.startswith("network"):
                failed_connections[node] += 1
                failed_connections[nodes[(index + 1) % len(nodes)]] += 1
            elif node not in unfit:
                unfit.append(node)
    if unfit or not any(failed_connections.values()):
        return unfit
    most = max(failed_connections.values())
    worst = [node for node in nodes if failed_connections[node] == most]
    return worst[1:] if len(worst) > 1 and worst[0] == nodes[0] else worst


def expand(nodelist: str) -> list[str]:
    """Return the node names of a Slurm node list such as n[1-3]."""
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main() -> int:
    """Supervise the run of the given job.json until it is done, requeued, or given up."""
    supervisor = Supervisor(json.loads(Path(sys.argv[1]).read_text()))
    os.environ.update(supervisor.job["environment"])
    supervisor.install_signal_handlers()
    code = supervisor.attempt()
    while code == RETRY:
        code = supervisor.requeue() if supervisor.job_id is not None else supervisor.attempt()
    return code


if __name__ == "__main__":
    sys.exit(main())
