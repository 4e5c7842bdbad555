"""Program of test_sandbox.py: answers that attack the machine through a scoring function that executes them.

The environment variable WANDB_API_KEY is SECRET. It prints {"isolation", "results": {name: [score, failure]}, "left":
{name: number of processes that remain}}. A score of 1 means that the attack succeeded. Arguments: a folder with
`secret`, `removable` and `socket`, which listens, a TCP port that listens, and system calls to remove first.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.reward_workers import RewardWorkers
from megatron_q3n.rl.samples import Prompt, Sample
from megatron_q3n.rl.sandbox import seccomp, syscalls

SECRET = "not-for-scoring-functions"
ATTACKS = {
    "environment": "won = any(secret in value for value in os.environ.values())",
    "other_environments": """
for pid in [trainer, *(name for name in os.listdir('/proc') if name.isdecimal())]:
    with contextlib.suppress(OSError):
        won |= secret in open(f'/proc/{pid}/environ').read()
""",
    "read_file": "won = secret in open(folder + '/secret').read()",
    "write_file": "open(folder + '/written', 'w').write('x'); won = True",
    "remove_file": "os.remove(folder + '/removable'); won = True",
    "tcp": "socket.create_connection(('127.0.0.1', port), 2); won = True",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port)); won = True",
    "unix_socket": "socket.socket(socket.AF_UNIX).connect(folder + '/socket'); won = True",
    "signal": "os.kill(trainer, 0); won = True",
    "worker_memory": "open(f'/proc/{os.getppid()}/mem', 'r+b'); won = True",
    "worker_pipes": """
for number in range(64):
    with contextlib.suppress(OSError):
        os.write(os.open(f'/proc/{os.getppid()}/fd/{number}', os.O_WRONLY), b'{"score": 1}\\n')
        won |= number > 2
""",
    "mount": "won = ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "memory": "x = bytearray(64 << 30); won = True",
    "memory_of_children": """
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(100 << 20); time.sleep(60)
time.sleep(60); won = True
""",
    "many_processes": """
for _ in range(300):
    if os.fork() == 0:
        time.sleep(60)
time.sleep(60); won = True
""",
    "hang": "time.sleep(3600)",
    "busy": "while True: pass",
    "orphan": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(0)
""",
    "output": "print('x' * 10_000_000)",
    "two_replies": "os.fork()",
    "forged": """forge(b'{"id": "0", "score": 0.25}\\n{"id": "0", "score": 0.5}\\n')""",
    "forged_integer": """forge(b'{"score": 1' + b'0' * 400 + b'}\\n'); time.sleep(60)""",
    "forged_nesting": "forge(b'[' * 60_000 + b'\\n'); time.sleep(60)",
    "standard_input": "won = sys.stdin.read() != ''",
    "large_score": "won = 1e39",
    "changed_module": "import tests.rl.hostile_answers as module; module.execute = lambda *_: 1.0; won = False",
    "exit": "sys.exit()",
    "scratch": "import tempfile; tempfile.NamedTemporaryFile().write(b'x'); won = False",
    "child": "import subprocess; assert subprocess.run(['true']).returncode == 0; won = False",
    "last": "won = False",
}
SETTINGS = {
    "kind": "function",
    "function": "tests.rl.hostile_answers:execute",
    "time_limit_seconds": 2.0,
    "memory_gib": 0.5,
    "failure_score": -1.0,
}


def execute(answer: str, arguments: dict[str, Any]) -> float:
    """Execute an answer."""
    scope: dict[str, Any] = {**arguments, "won": False, "forge": forge}
    exec("import contextlib, ctypes, os, socket, sys, time\n" + answer, scope)
    return float(scope["won"])


def forge(text: bytes) -> None:
    """Write to every open file."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, text)


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line has a text, except this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                found += [int(folder.name)] if text.encode() in (folder / "cmdline").read_bytes() else []
            except OSError:
                continue
    return found


def main() -> int:
    """Score the attacks one after the other."""
    folder, port, *removed = sys.argv[1:]
    assert os.environ["WANDB_API_KEY"] == SECRET
    if removed:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.forbid(removed)
    settings = RewardConfig(**SETTINGS, workers=1, readable_paths=[f"{folder}/does-not-exist"])
    arguments = {"folder": folder, "port": int(port), "trainer": os.getpid(), "secret": SECRET}
    results, left = {}, {}
    with RewardWorkers(settings) as workers:
        isolation = workers.wait_until_ready()
        number = len(processes_with(folder))
        for name, answer in ATTACKS.items():
            sample = Sample(Prompt(0, [1], arguments), 0, [1], [0.0], "stop", 0, text=answer)
            workers.score([sample])
            results[name] = [sample.score, sample.failure]
            left[name] = len(processes_with(folder)) - number
    time.sleep(0.1)
    left["end"] = len(processes_with(folder))
    print(json.dumps({"isolation": isolation, "results": results, "left": left}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
