"""Is this node fit to train? GPUs, disk and network, before an allocation is spent on finding out.

    srun --ntasks-per-node=1 python3 -m slurm.preflight FOLDER SETTINGS_JSON

Every node writes FOLDER/<node>.json. Nodes meet through FOLDER, which also shows that they share it: each listens on a
port, writes host and port down, and sends some MiB to the next one in a ring. GPUs are counted and their health
read by nvidia-smi; a kernel is not run here, since this must work outside any container.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

NETWORK_MIB = 64
DISK_MIB = 64


def main() -> int:
    """Check this node and write what was found; 0 if it is fit."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    number, count = int(os.environ.get("SLURM_NODEID", "0")), int(os.environ["SLURM_NNODES"])
    problems: list[str] = []
    problems += gpu_problems(settings["gpus_expected"], settings["minimum_gpu_free_mib"])
    problems += disk_problems(folder, settings)
    problems += network_problems(folder, number, count, settings)
    report = {"node": node, "problems": problems}
    partial = folder / f".{node}"
    partial.write_text(json.dumps(report))
    os.replace(partial, folder / f"{node}.json")
    print(f"preflight {node}: {'; '.join(problems) or 'fit'}", flush=True)
    return 1 if problems else 0


def gpu_problems(wanted: int, minimum_free_mib: float) -> list[str]:
    """Count the GPUs and look at their free memory and uncorrected memory errors."""
    if wanted == 0:
        return []
    fields = "index,memory.free,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"gpu: nvidia-smi does not answer ({error})"]
    if asked.returncode:
        return [f"gpu: nvidia-smi failed: {(asked.stdout + asked.stderr).strip()}"]
    return read_gpus(asked.stdout, wanted, minimum_free_mib)


def read_gpus(table: str, wanted: int, minimum_free_mib: float) -> list[str]:
    """Judge nvidia-smi's table of index, free MiB and uncorrected errors."""
    rows = [[cell.strip() for cell in row.split(",")] for row in table.strip().splitlines()]
    problems = [] if len(rows) >= wanted else [f"gpu: {len(rows)} of {wanted} are there"]
    for index, free, errors in rows:
        if re.fullmatch(r"\d+", free) and int(free) < minimum_free_mib:
            problems.append(f"gpu {index}: only {free} MiB free, another process holds the rest")
        if re.fullmatch(r"\d+", errors) and int(errors) > 0:
            problems.append(f"gpu {index}: {errors} uncorrected memory errors")
    return problems


def disk_problems(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Write, force to disk and read back in the run directory, and look for room there and in /tmp."""
    problems = []
    for place, needed in ((folder, settings["minimum_free_gib"]), (tempfile.gettempdir(), 0.1)):
        stat = os.statvfs(place)
        free = stat.f_bavail * stat.f_frsize / 2**30
        if free < needed:
            problems.append(f"disk: {free:.1f} GiB free in {place}, {needed} needed")
    block, began = os.urandom(2**20), time.monotonic()
    path = folder / f".disk-{socket.gethostname()}-{os.getpid()}"
    try:
        with path.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rate = DISK_MIB / (time.monotonic() - began)
        with path.open("rb") as file:
            same = all(file.read(2**20) == block for _ in range(DISK_MIB))
        path.unlink()
    except OSError as error:
        return [*problems, f"disk: {folder} cannot be written ({error})"]
    if not same:
        problems.append(f"disk: {folder} gave back other bytes than were written")
    if rate < settings["minimum_disk_mib_per_second"]:
        problems.append(f"disk: {rate:.0f} MiB/s to {folder}")
    return problems


def network_problems(folder: Path, number: int, count: int, settings: dict[str, Any]) -> list[str]:
    """Send to the next node in the ring and receive from the one before."""
    if count == 1:
        return []
    deadline = time.monotonic() + settings["timeout_seconds"]
    with socket.create_server(("", 0)) as server:
        address = settings.get("master_address") or socket.gethostname()
        write_address(folder, number, f"{address} {server.getsockname()[1]}")
        receiver = threading.Thread(target=_receive, args=(server, deadline), daemon=True)
        receiver.start()
        problems = _send(folder, (number + 1) % count, deadline, settings)
        receiver.join(max(0.1, deadline - time.monotonic()))
        if receiver.is_alive():
            problems.append(f"network: nothing came from node {(number - 1) % count}")
    return problems


def write_address(folder: Path, number: int, text: str) -> None:
    """Let the others find this node; whole or not there."""
    partial = folder / f".address-{number}.new"
    partial.write_text(text)
    os.replace(partial, folder / f"address-{number}")


def _receive(server: socket.socket, deadline: float) -> None:
    server.settimeout(max(0.1, deadline - time.monotonic()))
    try:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            left = NETWORK_MIB * 2**20
            while left > 0:
                part = connection.recv(min(left, 2**20))
                if not part:
                    return
                left -= len(part)
            connection.sendall(b"!")
    except OSError:
        # told by the sender, who knows how far it came; not finishing is what the caller sees
        threading.Event().wait(max(0.0, deadline + 1 - time.monotonic()))


def _send(folder: Path, number: int, deadline: float, settings: dict[str, Any]) -> list[str]:
    path = folder / f"address-{number}"
    while not path.exists():
        if time.monotonic() > deadline:
            return [f"network: node {number} did not write its address to {folder}"]
        time.sleep(0.1)
    host, port = path.read_text().split()
    began = time.monotonic()
    try:
        with socket.create_connection((host, int(port)), max(0.1, deadline - began)) as connection:
            block = bytes(2**20)
            for _ in range(NETWORK_MIB):
                connection.sendall(block)
            answered = connection.recv(1) == b"!"
    except OSError as error:
        return [f"network: {host}:{port} (node {number}) not reached ({error})"]
    rate = NETWORK_MIB / (time.monotonic() - began)
    if not answered:
        return [f"network: node {number} broke off"]
    if rate < settings["minimum_network_mib_per_second"]:
        return [f"network: {rate:.0f} MiB/s to node {number} ({host})"]
    return []


if __name__ == "__main__":
    sys.exit(main())
