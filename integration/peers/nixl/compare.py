"""Prints NIXL and Baton side by side for the same shapes on this machine. Started by run.sh.

Usage: compare.py BATON SECONDS ROUNDS [BLOCKSxBYTES...]

Both are measured in turns, several rounds of each; a figure is the median of the rounds' medians.
"""
import collections
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

SHAPES = ["1x4096", "64x4096", "1024x4096", "1x65536", "64x65536", "1x1048576", "32x1048576"]
# What NIXL's UCX may use, and which of Baton's backends move bytes in the same situation.
SETTINGS = [("tcp,cma", ["shm", "cma"]), ("tcp", ["tcp", "ucx", "libfabric"])]
MEASURE = pathlib.Path(__file__).with_name("measure.py")


def rows(command, **environment):
    run = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode != 0:
        print(f"{command[0]} ended with {run.returncode} after {len(found)} rows", file=sys.stderr)
    return found


def main(baton, seconds, rounds, shapes):
    times = collections.defaultdict(list)
    for _ in range(rounds):
        for tls, backends in SETTINGS:
            for row in rows([sys.executable, str(MEASURE), str(seconds), *shapes], UCX_TLS=tls):
                times[f"nixl {tls}", row["op"], row["blocks"], row["block_bytes"]].append(row["p50_us"])
            chosen = [f"--shape={shape}" for shape in shapes]
            bench = [baton, "bench", "transfer", "--json", f"--backend={','.join(backends)}"]
            for row in rows([*bench, f"--seconds={seconds}", *chosen]):
                shape = (row["op"], row["blocks"], row["block_bytes"])
                times[row["backend"], row["integrity"], *shape].append(row["p50_us"])
                times[row["backend"], "raw", *shape].append(row["raw_p50_us"])
    median = lambda *key: statistics.median(times[key]) if times[key] else None
    version = subprocess.run([baton, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}; "
          f"{version}, nixl {importlib.metadata.version('nixl')}; median of {rounds} rounds, us")
    print(f"{'NIXL over':10} {'op':5} {'blocks':>16} {'NIXL':>9}   {'Baton':9} {'plain':>9} {'digest':>9} "
          f"{'raw':>9} {'plain/NIXL':>10}")
    cell = lambda value: "-" if value is None else f"{value:.1f}"
    for tls, backends in SETTINGS:
        for shape in shapes:
            blocks, block_bytes = map(int, shape.split("x"))
            for op in ["read", "write"]:
                nixl = median(f"nixl {tls}", op, blocks, block_bytes)
                for backend in backends:
                    plain, digest, raw = (median(backend, kind, op, blocks, block_bytes) for kind in ("off", "digest", "raw"))
                    if plain is None:
                        continue
                    ratio = "-" if nixl is None else f"{plain / nixl:.2f}"
                    print(f"{tls:10} {op:5} {blocks:>6} x {block_bytes:>7} {cell(nixl):>9}   {backend:9} {cell(plain):>9} "
                          f"{cell(digest):>9} {cell(raw):>9} {ratio:>10}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or SHAPES)
