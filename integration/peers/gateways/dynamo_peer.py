"""Dynamo's frontend in front of its own mocker: it does not speak to workers of others."""
import os
import pathlib
import tempfile

import compare
import peers

PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]


WORKERS = 2
MODES = [("kv", "default"), ("kv", "fastokens"), ("round-robin", "default")]


def commands(mode, tokenizer, port, model, workers):
    python = str(peers.VENVS / "dynamo/bin/python")
    frontend = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port),
                "--router-mode", mode, "--tokenizer", tokenizer, *PLANES]
    # A ratio of 0 is said to be endless and is real time.
    mocker = [python, "-m", "dynamo.mocker", "--model-path", model, "--model-name", "bench", "--block-size", "16",
              "--num-workers", str(workers), "--speedup-ratio", "1000000", *PLANES]
    return frontend, mocker


def measure_all(baton, out, cells, rounds, seconds, rows):
    """Sends what the others got through each mode of its router; its engines count nothing that could be read here."""
    hold = compare.Held(baton, "short", 1)
    try:
        for mode, tokenizer in MODES:
            with tempfile.TemporaryDirectory() as folder:
                port = peers.free_port()
                frontend, mocker = commands(mode, tokenizer, port, hold.place["model"], WORKERS)
                environment = {"DYN_FILE_KV": folder, "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn"}
                log = open(pathlib.Path(out, f"dynamo-{mode}-{tokenizer}.log"), "w")
                name = f"dynamo {mode}" + ("" if tokenizer == "default" else f" {tokenizer}")
                gateway = compare.Gateway(name, frontend, f"http://127.0.0.1:{port}", log, environment)
                workers = compare.Gateway("mocker", mocker, gateway.url, log, environment)
                gateway.shown = " ".join(frontend) + "` with `" + " ".join(mocker)
                try:
                    if not gateway.ready():
                        continue
                    for workload, clients in cells:
                        for _ in range(rounds):
                            row = compare.measure(baton, gateway, [], workload, clients, seconds)
                            if row:
                                rows.add(row, WORKERS)
                finally:
                    gateway.stop()
                    workers.stop()
    finally:
        hold.stop()
