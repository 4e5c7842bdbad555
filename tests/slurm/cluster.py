"""A real Slurm of several nodes on this machine: slurmctld, one slurmd per node, munge with a key of its own.

As root or not, without systemd and cgroups, on ports of its own, all files in one folder. Debian's slurm-wlm allows
several slurmd on one host (MULTIPLE_SLURMD). Two settings matter: with munge's usual credential lifetime of five
minutes a requeued job waits two minutes; and MinJobAge keeps ended jobs in squeue, which tests ask.
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
SYSTEM_FOLDERS = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", "/sbin"))  # not on everyone's PATH
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
    """Return the programs that are not installed here."""
    path = os.pathsep.join((os.environ["PATH"], SYSTEM_FOLDERS))
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@dataclass
class Cluster:
    """A running Slurm; `environment` is what its client programs need."""

    root: Path
    nodes: int = 2
    cpus: int = 2
    first_job: int = 1  # ports of a job's processes follow from its number
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Bring it up and wait until every node is idle."""
        for folder in ("ctld", "spool", "log", *(f"spool/n{i + 1}" for i in range(self.nodes))):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)  # munge wants nobody else to write here; pytest's folders are private
        path = os.pathsep.join((os.environ["PATH"], SYSTEM_FOLDERS))
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}
        (self.root / "slurm.conf").write_text(self._conf())
        self._start_munge()
        self._run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for number in range(self.nodes):
            self._run("slurmd", "-f", self.environment["SLURM_CONF"], "-N", f"n{number + 1}")
        self._wait_for_nodes()

    def stop(self) -> None:
        """End every job and daemon of this cluster; what does not end by itself is killed."""
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
        """End every job."""
        ask: dict[str, Any] = {"env": self.environment, "check": False, "capture_output": True, "text": True}
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], **ask)
        deadline = time.monotonic() + 12  # KillWait and a little
        while subprocess.run(["squeue", "-h"], **ask).stdout and time.monotonic() < deadline:
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """Run one of Slurm's client programs and return what it prints."""
        return self._run(*command).strip()

    def state(self, job: str) -> str:
        """Return a job's state, e.g. PENDING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def lose(self, node: str) -> None:
        """Set a node down, as an administrator does or Slurm when it no longer answers."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def bring_back(self, node: str, seconds: float = 60) -> None:
        """Resume a node that is down; one that has registered again by itself is left as it is."""
        deadline = time.monotonic() + seconds
        while (state := self.run("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T")) != "idle":
            assert time.monotonic() < deadline, state
            if state.startswith("down"):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            time.sleep(0.5)

    def wait(self, job: str, *wanted: str, seconds: float = 240) -> str:
        """Wait until a job is in one of the states and return it."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in wanted:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {wanted}"
            time.sleep(0.2)
        return state

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

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
    """Return the first of `count` ports in a row that nobody listens on now."""
    for first in range(16800 + secrets.randbelow(400) * 20, 32000, 20):
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
