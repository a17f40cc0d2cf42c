"""Measures NIXL's UCX backend between two processes of this machine, one JSON object a row.

Usage: UCX_TLS=tcp,cma measure.py SECONDS BLOCKSxBYTES...

The target is this program once more. Blocks lie scattered as in `baton bench transfer`: every second place is empty and
neighbours of a transfer are no neighbours in memory. Lists are prepared once, each transfer is posted and polled.
"""
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time

from nixl._api import nixl_agent, nixl_agent_config

ROLE = "target"


def memory(size, byte):
    """Anonymous memory, touched, and its address."""
    buffer = mmap.mmap(-1, size)
    for start in range(0, size, 1 << 20):
        end = min(start + (1 << 20), size)
        buffer[start:end] = bytes([byte]) * (end - start)
    return buffer, ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def agent(name):
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def serve(size):
    """The target: registers memory, says where, and lives until its input ends."""
    target = agent(ROLE)
    buffer, address = memory(size, 0xA5)
    registered = target.register_memory([(address, size, 0, "")], "DRAM")
    print(json.dumps({"metadata": target.get_agent_metadata().hex(), "address": address}), flush=True)
    sys.stdin.read()
    target.deregister_memory(registered)


def offsets(blocks, block_bytes):
    step = 1 if blocks % 5 == 0 else 5
    return [index * step % blocks * 2 * block_bytes for index in range(blocks)]


def percentile(times, part):
    times.sort()
    return times[min(int(len(times) * part), len(times) - 1)] * 1e6


def transfer(initiator, handle):
    start = time.perf_counter()
    state = initiator.transfer(handle)
    while state == "PROC":
        state = initiator.check_xfer_state(handle)
    if state != "DONE":
        raise SystemExit(f"a transfer ended as {state}")
    return time.perf_counter() - start


def measure(seconds, shapes):
    size = max(2 * blocks * block_bytes for blocks, block_bytes in shapes)
    target = subprocess.Popen(
        [sys.executable, __file__, ROLE, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = next(line for line in target.stdout if line.startswith("{"))
    peer = json.loads(line)
    initiator = agent("initiator")
    buffer, address = memory(size, 0)
    registered = initiator.register_memory([(address, size, 0, "")], "DRAM")
    name = initiator.add_remote_agent(bytes.fromhex(peer["metadata"]))
    for blocks, block_bytes in shapes:
        places = offsets(blocks, block_bytes)
        own = initiator.prep_xfer_dlist("", [(address + at, block_bytes, 0) for at in places], "DRAM")
        theirs = initiator.prep_xfer_dlist(name, [(peer["address"] + at, block_bytes, 0) for at in places], "DRAM")
        indices = list(range(blocks))
        for op in ["READ", "WRITE"]:
            handle = initiator.make_prepped_xfer(op, own, indices, theirs, indices)
            transfer(initiator, handle)
            assert buffer[places[-1] + block_bytes - 1] == 0xA5, "the blocks were not moved"
            times, start = [], time.perf_counter()
            while time.perf_counter() - start < seconds or not times:
                times.append(transfer(initiator, handle))
            row = {"op": op.lower(), "blocks": blocks, "block_bytes": block_bytes}
            print(json.dumps(row | {"p50_us": percentile(times, 0.5), "p99_us": percentile(times, 0.99)}), flush=True)
            initiator.release_xfer_handle(handle)
        initiator.release_dlist_handle(own)
        initiator.release_dlist_handle(theirs)
    initiator.remove_remote_agent(name)
    initiator.deregister_memory(registered)
    target.stdin.close()
    target.wait()


if __name__ == "__main__":
    if sys.argv[1] == ROLE:
        serve(int(sys.argv[2]))
    else:
        measure(float(sys.argv[1]), [tuple(map(int, shape.split("x"))) for shape in sys.argv[2:]])
    # Version 1.5.1 crashes while the interpreter takes its libraries down: everything is said, leave without.
    sys.stdout.flush()
    os._exit(0)
