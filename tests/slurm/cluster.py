"""Slurm cluster of several nodes on this machine: slurmctld, one slurmd per node, and munge with a separate key.

It runs as root or any user, without systemd and cgroups, on free ports, with all files in one folder. Debian's
slurm-wlm allows several slurmd on one host (MULTIPLE_SLURMD). Two settings matter: cred_expire, because with munge's
default credential lifetime of five minutes a requeued job is delayed by two minutes; and MinJobAge, which keeps ended
jobs in squeue for the tests.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
# often not on the PATH of users
SYSTEM_FOLDERS = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", "/sbin"))
CONF = """\
ClusterName=q3n
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout=60
InactiveLimit=0
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
SlurmdParameters=config_overrides
TreeWidth=65533
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    path = os.pathsep.join((os.environ["PATH"], SYSTEM_FOLDERS))
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@dataclass
class Cluster:
    """A running Slurm cluster; `environment` contains the variables for its client programs."""

    root: Path
    nodes: int = 2
    cpus: int = 2
    # the ports of a job's processes are derived from its id
    first_job: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for folder in ("ctld", "spool", "log", *(f"spool/n{i + 1}" for i in range(self.nodes))):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        # munge requires a folder that only its owner can write, and that others can read
        self.root.chmod(0o755)
        path = os.pathsep.join((os.environ["PATH"], SYSTEM_FOLDERS))
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}
        (self.root / "slurm.conf").write_text(self._conf())
        self._start_munge()
        self._run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for number in range(self.nodes):
            self._run("slurmd", "-f", self.environment["SLURM_CONF"], "-N", f"n{number + 1}")
        self._wait_for_nodes()

    def stop(self) -> None:
        """End all jobs and daemons of this cluster; kill daemons that do not exit on SIGTERM."""
        self.cancel_all()
        names = [*(f"slurmd-n{i + 1}" for i in range(self.nodes)), "slurmctld", "munged"]
        files = [path for name in names if (path := self.root / f"{name}.pid").exists()]
        ids = [int(text) for path in files if (text := path.read_text().strip())]
        daemons = [psutil.Process(number) for number in ids if psutil.pid_exists(number)]
        for daemon in daemons:
            daemon.terminate()
        for daemon in psutil.wait_procs(daemons, timeout=5)[1]:
            daemon.kill()

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they have ended."""
        options: dict[str, Any] = {"env": self.environment, "check": False, "capture_output": True, "text": True}
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], **options)
        # more than KillWait
        deadline = time.monotonic() + 12
        while subprocess.run(["squeue", "-h"], **options).stdout and time.monotonic() < deadline:
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """Run a Slurm client program and return its output."""
        return self._run(*command).strip()

    def state(self, job: str) -> str:
        """Return a job's state, e.g. PENDING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def set_down(self, node: str) -> None:
        """Set a node down, as an administrator would, or as Slurm does with an unresponsive node."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def resume_node(self, node: str, seconds: float = 60) -> None:
        """Resume a node that is down, unless it has registered again already, and wait until it is idle."""
        deadline = time.monotonic() + seconds
        while (state := self.run("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T")) != "idle":
            assert time.monotonic() < deadline, state
            if state.startswith("down"):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            time.sleep(0.5)

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """Wait until a job is in one of the states and return that state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}"
            time.sleep(0.2)
        return state

    def _run(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def _conf(self) -> str:
        port = _free_ports(self.nodes + 1)
        return CONF.format(
            host=socket.gethostname().split(".")[0],
            port=port,
            first=port + 1,
            last=port + self.nodes,
            user=getpass.getuser(),
            root=self.root,
            nodes=self.nodes,
            cpus=self.cpus,
            first_job=self.first_job,
        )

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": "key", "socket": "socket", "seed-file": "seed"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        options += [f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/log/munged.log"]
        self._run("munged", "--force", "--num-threads=2", *options)

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 20
        while len(re.findall("idle", self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T"))) < self.nodes:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l")
            time.sleep(0.1)


def _free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    for first in range(16800 + secrets.randbelow(400) * 20, 32000, 20):
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
