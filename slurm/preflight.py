"""Pre-flight check of a node before training: GPUs, disk and network.

    srun --ntasks-per-node=1 python3 -m slurm.preflight FOLDER SETTINGS_JSON

Every node writes its report to FOLDER/<node>.json. Nodes exchange their addresses through FOLDER, which also verifies
that it is shared: each node listens on a port, writes host and port to a file, and sends data to the next node of a
ring. GPUs are counted and their health is read with nvidia-smi; no kernel is run, because the check must work outside
containers.
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
    """Check this node and write its report; return 0 if it is fit, else 1."""
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


def gpu_problems(expected: int, minimum_free_mib: float) -> list[str]:
    """Return problems with the number of GPUs, their free memory and their uncorrected memory errors."""
    if expected == 0:
        return []
    fields = "index,memory.free,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"gpu: nvidia-smi could not run or timed out ({error})"]
    if result.returncode:
        return [f"gpu: nvidia-smi failed: {(result.stdout + result.stderr).strip()}"]
    return read_gpus(result.stdout, expected, minimum_free_mib)


def read_gpus(table: str, expected: int, minimum_free_mib: float) -> list[str]:
    """Return the problems in nvidia-smi's table of index, free MiB and uncorrected errors."""
    rows = [[cell.strip() for cell in row.split(",")] for row in table.strip().splitlines()]
    problems = [] if len(rows) >= expected else [f"gpu: {len(rows)} of {expected} found"]
    for index, free, errors in rows:
        if re.fullmatch(r"\d+", free) and int(free) < minimum_free_mib:
            problems.append(f"gpu {index}: only {free} MiB free, the rest is used by another process")
        if re.fullmatch(r"\d+", errors) and int(errors) > 0:
            problems.append(f"gpu {index}: {errors} uncorrected memory errors")
    return problems


def disk_problems(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return problems with free space (run directory and /tmp) and with writing, fsync and reading back."""
    problems = []
    for directory, needed in ((folder, settings["minimum_free_gib"]), (tempfile.gettempdir(), 0.1)):
        stat = os.statvfs(directory)
        free = stat.f_bavail * stat.f_frsize / 2**30
        if free < needed:
            problems.append(f"disk: {free:.1f} GiB free in {directory}, {needed} needed")
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
            is_same = all(file.read(2**20) == block for _ in range(DISK_MIB))
        path.unlink()
    except OSError as error:
        return [*problems, f"disk: {folder} cannot be written ({error})"]
    if not is_same:
        problems.append(f"disk: data read back from {folder} differ from the data written")
    if rate < settings["minimum_disk_mib_per_second"]:
        problems.append(f"disk: {rate:.0f} MiB/s to {folder}")
    return problems


def network_problems(folder: Path, number: int, count: int, settings: dict[str, Any]) -> list[str]:
    """Return problems with sending to the next node of the ring and receiving from the previous one."""
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
            problems.append(f"network: nothing received from node {(number - 1) % count}")
    return problems


def write_address(folder: Path, number: int, text: str) -> None:
    """Write this node's address file atomically."""
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
        # keep this thread alive, which the caller reports as "nothing received"; the sender reports the error itself
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
            is_acknowledged = connection.recv(1) == b"!"
    except OSError as error:
        return [f"network: {host}:{port} (node {number}) cannot be reached ({error})"]
    rate = NETWORK_MIB / (time.monotonic() - began)
    if not is_acknowledged:
        return [f"network: node {number} closed the connection"]
    if rate < settings["minimum_network_mib_per_second"]:
        return [f"network: {rate:.0f} MiB/s to node {number} ({host})"]
    return []


if __name__ == "__main__":
    sys.exit(main())
