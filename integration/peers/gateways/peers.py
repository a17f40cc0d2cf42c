"""How the other gateways are started in front of engines that speak OpenAI's protocol."""
import pathlib
import socket
import subprocess

VENVS = pathlib.Path("target/peers").resolve()
WHEELS = {"dynamo": "ai-dynamo"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def version(name):
    wheel = WHEELS.get(name, name)
    script = f"import importlib.metadata as m; print('{wheel}', m.version('{wheel}'))"
    run = subprocess.run([VENVS / name / "bin/python", "-c", script], stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()


def command(name, policy, port, engines):
    """The command line, and what to add to the environment.

    Logs are cut to warnings where that can be said: what they print for every request is no part of a gateway.
    """
    place = VENVS / name / "bin"
    common = ["--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--worker-urls", *engines,
              "--prometheus-port", str(free_port()), "--log-level", "warning" if name == "vllm-router" else "warn"]
    starts = {
        "vllm-router": [str(place / "vllm-router")],
        "sglang-router": [str(place / "python"), "-m", "sglang_router.launch_router"],
        "smg": [str(place / "smg"), "launch"],
    }
    return starts[name] + common, {"RUST_LOG": "warn"}
