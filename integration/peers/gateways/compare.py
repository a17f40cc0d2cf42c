"""Measures gateways in front of the same simulated engines and writes one markdown document. Started by run.sh.

Usage: compare.py BATON OUT NAME...

For each kind of engines (`baton bench router --hold`) every gateway is started; then each workload is sent through each of
them in turn, round after round, by `baton bench router --url`. A figure is the median of the rounds.
"""
import collections
import datetime
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import peers

QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if QUICK else 3))
SECONDS = float(os.environ.get("SECONDS_EACH", 0.7 if QUICK else 1.5))
READY_WITHIN_S = 90

# Kind of engines, workers, policies of peers, and what is sent: workload, concurrency, rounds, seconds.
# Which workloads; those that have a rate, with how many workers, and how many times as slow.
NAMED = os.environ.get("WORKLOADS", "").split()
WORKERS = int(os.environ.get("WORKERS", 4))
STRETCH = int(os.environ.get("STRETCH", 1))
RATED = [("chats", 0, 1, SECONDS)] if QUICK and not NAMED else [
    (name, 0, 1, SECONDS) for name in ("prefixes", "zipf", "chats")]
CLOSED = [("short", 1), ("short", 256), ("shared", 256), ("stream", 256)]
if not QUICK or NAMED:
    # What costs memory is measured by itself: streams that yield nothing.
    CLOSED = [(name, c) for name in ("short", "shared", "stream") for c in (1, 32, 256, 1024)] + [("large", 8)]
GROUPS = [
    ("engines that take no time", 2, ["round_robin"], [(*cell, ROUNDS, SECONDS) for cell in CLOSED]),
    ("a token every 20 ms", 2, ["round_robin"], [] if QUICK and not NAMED else [("paced", 256, 1, 6)]),
    ("a token never", 2, ["round_robin"], [] if QUICK and not NAMED else [("quiet", 2000, 1, 5)]),
    ("engines with prefill times and small prefix caches", WORKERS, ["round_robin", "cache_aware"], RATED),
]


def chosen(cells):
    return [cell for cell in cells if not NAMED or cell[0] in NAMED]


def children(pid):
    """The process and all its descendants."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def ask(url, path="/v1/chat/completions", timeout=10):
    body = {"model": "bench", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.status


def models(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=10) as answer:
        return answer.status


class Gateway:
    """A process that is measured; `direct` is none at all."""

    def __init__(self, name, command, url, log, environment=None, pids=None):
        self.name, self.command, self.url, self.log = name, command, url, log
        self.process = None
        self.shown = " ".join(command or [])
        self.pids = pids
        if command:
            self.process = subprocess.Popen(command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def ready(self, still=False):
        """Waits for the first good answer, or for the list of models; False when there is none."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.process and self.process.poll() is not None:
                break
            try:
                if (models if still else ask)(self.url) == 200:
                    # Some come up with one engine and find the others a moment later.
                    if self.process:
                        self.pids = children(self.process.pid)
                    return True
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        print(f"{self.name} gave no answer: left out; see its log in {self.log.name}", file=sys.stderr)
        return False

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Held:
    """A fleet of simulated engines with one router, by `baton bench router --hold`."""

    def __init__(self, baton, workload, workers):
        self.command = [baton, "bench", "router", "--hold", "--workload", workload, "--workers", str(workers),
                        "--stretch", str(STRETCH), "--passing"]
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.place = json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def baton_router(baton, place, policy, port, folder):
    """Another router of the same fleet."""
    config = pathlib.Path(folder, f"{policy}.yaml")
    text = pathlib.Path(place["config"]).read_text()
    config.write_text(text.replace("kind: kv_aware", f"kind: {policy}"))
    return [baton, "--log", "warn", "router", "--config", str(config), "--conductor", place["conductor"],
            "--listen", f"127.0.0.1:{port}"]


def measure(baton, gateway, engines, workload, clients, seconds):
    command = [baton, "bench", "router", "--json", "--no-direct", "--url", gateway.url, "--workload", workload,
               "--seconds", str(seconds), "--stretch", str(STRETCH)]
    if clients:
        command += ["--concurrency", str(clients)]
    if gateway.pids:
        command += ["--pid", ",".join(map(str, gateway.pids))]
    if engines:
        command += ["--engine-url", ",".join(engines)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode != 0:
        print(f"{gateway.name}, {workload} at {clients}: {run.stderr.strip()[-300:]}", file=sys.stderr)
    return rows[0] | {"gateway": gateway.name, "command": gateway.shown} if rows else None


class Rows:
    """Every row that was measured, in a file; what is measured again takes the place of what was there."""

    def __init__(self, out):
        self.path = pathlib.Path(out, "rows.jsonl")
        if not NAMED:
            self.path.unlink(missing_ok=True)
        self.run = time.time()

    def add(self, row, workers):
        row |= {"workers": workers, "stretch": STRETCH, "run": self.run}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def tables(self):
        """Workload, concurrency, workers -> gateway -> its rows of the last run that had it."""
        tables = collections.OrderedDict()
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            row = json.loads(line)
            table = tables.setdefault((row["workload"], row["concurrency"], row["workers"]), collections.OrderedDict())
            found = table.get(row["gateway"], [])
            table[row["gateway"]] = [*(old for old in found if old["run"] == row["run"]), row]
        return tables


def group(baton, out, names, workers, policies, cells, rows):
    gateways = []
    fleet = Held(baton, cells[0][0], workers)
    place, engines = fleet.place, fleet.place["engines"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            log = lambda name: open(pathlib.Path(out, f"{name.replace(' ', '-')}.log"), "w")
            started = [Gateway("direct", None, ",".join(engines), log("direct"))]
            started.append(Gateway("baton kv_aware", None, place["router"], log("baton"), pids=[place["router_pid"]]))
            port = peers.free_port()
            started.append(Gateway("baton round_robin", baton_router(baton, place, "round_robin", port, folder),
                                   f"http://127.0.0.1:{port}", log("baton-round-robin")))
            # As to servers of other projects: `engine: { kind: openai }`.
            passing = place["passing"]
            started.append(Gateway("baton passing on", None, passing["router"], log("baton-passing"),
                                   pids=[passing["router_pid"]]))
            for name in names:
                for policy in policies:
                    port = peers.free_port()
                    command, environment = peers.command(name, policy, port, engines)
                    started.append(Gateway(f"{name} {policy}", command, f"http://127.0.0.1:{port}",
                                           log(f"{name}-{policy}"), environment))
            for gateway in started:
                gateways.append(gateway)
                shown = gateway.command or (["(no gateway)"] if gateway.name == "direct" else fleet.command)
                gateway.shown = " ".join(shown)
            # Engines that yield no token answer nobody: there a gateway that lives is ready.
            still = cells[0][0] == "quiet"
            good = [gateway for gateway in started if gateway.name == "direct" or gateway.ready(still)]
            if still:
                good = [gateway for gateway in good if gateway.name != "direct"]
            for workload, clients, rounds, seconds in cells:
                for turn in range(rounds):
                    # Whoever comes first meets a machine that has rested: not always the same one.
                    for gateway in good[turn % len(good):] + good[:turn % len(good)]:
                        row = measure(baton, gateway, engines, workload, clients, seconds)
                        if row:
                            rows.add(row, workers)
        finally:
            for gateway in gateways:
                gateway.stop()
            fleet.stop()


COLUMNS = [
    ("requests/s", lambda r: r["req_per_s"], "{:.0f}"),
    ("tokens/s", lambda r: r["tok_per_s"], "{:.0f}"),
    ("first token p50 us", lambda r: r["first_p50_us"], "{:.0f}"),
    ("p99 us", lambda r: r["first_p99_us"], "{:.0f}"),
    ("CPU s/1000", lambda r: r["cpu_s_per_1000"], "{:.3f}"),
    ("CPU us/token", lambda r: r["cpu_us_per_token"], "{:.2f}"),
    ("machine busy", lambda r: r["machine_busy"], "{:.2f}"),
    ("RSS MiB", lambda r: r["resident_mib"], "{:.0f}"),
    ("before", lambda r: r.get("around_mib", [r["resident_mib"]])[0], "{:.0f}"),
    ("after", lambda r: r.get("around_mib", [r["resident_mib"]])[-1], "{:.0f}"),
    ("hit rate", lambda r: r["hit_rate"], "{:.2f}"),
    ("worst share", lambda r: r["worst_share"], "{:.2f}"),
    ("failed", lambda r: r["failed"], "{:.0f}"),
]


def document(tables, versions):
    commands = collections.OrderedDict()
    lines = ["# Gateways side by side", "",
             f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}; "
             f"{', '.join(versions)}; median of up to {ROUNDS} rounds of {SECONDS} s. "
             f"What the workloads are: docs/benchmarks.md. `added` is over the row `direct`.", ""]
    for (workload, clients, workers), gateways in tables.items():
        stretch = next(iter(gateways.values()))[0]["stretch"]
        how = f"{workers} workers" + (f", all {stretch} times as slow" if stretch > 1 else "")
        lines += [f"## {workload}, " + (how if workload in ("prefixes", "zipf", "chats") else f"{clients} at once"),
                  "", "| gateway | " + " | ".join(name for name, _, _ in COLUMNS) + " | added p50 us | added p99 us |",
                  "|---" * (len(COLUMNS) + 3) + "|"]
        median = lambda found, value: statistics.median(value(row) for row in found)
        direct = gateways.get("direct")
        for name, found in gateways.items():
            commands.setdefault(name, found[0]["command"])
            values = [form.format(median(found, value)) for _, value, form in COLUMNS]
            added = ["-", "-"]
            if direct and name != "direct":
                added = [f"{median(found, value) - median(direct, value):.0f}" for _, value, _ in COLUMNS[2:4]]
            lines.append(f"| {name} | " + " | ".join(values + added) + " |")
        lines.append("")
    lines += ["## Commands", "", *[f"- {name}: `{command}`" for name, command in commands.items()], ""]
    return "\n".join(lines)


def main(baton, out, names):
    baton = str(pathlib.Path(baton).resolve())
    version = subprocess.run([baton, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    versions = [version, *[peers.version(name) for name in names]]
    rows = Rows(out)
    for title, workers, policies, cells in GROUPS:
        if cells := chosen(cells):
            print(f"{title}: {len(cells)} workloads", file=sys.stderr)
            group(baton, out, [name for name in names if name != "dynamo"], workers, policies, cells, rows)
    if "dynamo" in names:
        import dynamo_peer
        # Once: it is far from the others. Its context is shorter than the large prompts.
        cells = [cell for cell in chosen(CLOSED) if cell[0] != "large"]
        dynamo_peer.measure_all(baton, out, cells, 1, SECONDS, rows)
    text = document(rows.tables(), versions)
    pathlib.Path(out, "gateways.md").write_text(text)
    print(text)


if __name__ == "__main__":
    # What was started ends with this, however it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.modules["compare"] = sys.modules["__main__"]
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
