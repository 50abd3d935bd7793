"""Writers and collectors of one store, killed at random moments; prints what was acknowledged before.

Run by test_store_crash.py as a process of its own, which forks the ones that are killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

from linstate.state.store import StateStore
from tiny_states import tiny


def write(folder: str, seed: int, acknowledged: int) -> None:
    """Put, fork and delete until killed; say of every state what its content is once it is acknowledged."""
    store, rng = StateStore(folder), random.Random(seed)
    while True:
        state = tiny([rng.randrange(12) for _ in range(rng.randrange(1, 12))])  # few texts: many are shared
        handle = store.put(state, name=rng.choice([None, "newest"]), move=True, ids=[0] * state.position)
        if rng.random() < 0.3:
            handle = store.fork(handle.id)
        if rng.random() < 0.3:  # objects that lose their last handle while others put the same
            store.delete(handle.id)
        else:
            os.write(acknowledged, f"{handle.id} {state.id}\n".encode())


def collect(folder: str, seed: int, acknowledged: int) -> None:
    """Collect until killed."""
    store = StateStore(folder)
    while True:
        store.gc()


def main(folder: str, rounds: int) -> None:
    rng, kills = random.Random(7), 0
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    StateStore(folder).close()
    lines = b""
    for number in range(rounds):
        children = []
        for job in (write, write, collect):
            if (child := os.fork()) == 0:
                try:
                    job(folder, number * 10 + len(children), write_end)
                finally:
                    os._exit(1)
            children.append(child)
        time.sleep(0.02)
        for child in children:
            time.sleep(rng.random() * 0.015)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
        while True:
            try:
                lines += os.read(read_end, 1 << 16)
            except BlockingIOError:
                break
    print(
        json.dumps({"kills": kills, "acknowledged": [line.split() for line in lines.decode().splitlines()]})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
