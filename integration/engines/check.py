"""Drives a real engine straight and through Baton, and compares: check.py BATON OUT NAME...

Every check is a function that raises; what it says when it does not is written beside it. Exits with 1 when one failed.
"""
import contextlib
import datetime
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/models/tiny"
ENGINES = ROOT / "target/engines"
# vLLM imports for a minute of CPU time before it listens.
STARTS_WITHIN_S = 600
PROMPT = "Once upon a time there was a"
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"], "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


class Unlike(Exception):
    """Something is not as it should be."""


def expect(holds, what):
    if not holds:
        raise Unlike(what)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm(model, port):
    command = [
        str(ENGINES / "vllm/bin/python"), "-m", "vllm.entrypoints.cli.main", "serve", str(TINY), "--served-model-name",
        model, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32",
        "--max-num-seqs", "16", "--max-model-len", "4096", "--kv-cache-memory-bytes", str(128 << 20),
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        # So small a model would write blanks without end where a schema allows them.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]
    return command, {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        # Else the first request with log-probabilities compiles for minutes, in silence.
        "TORCH_COMPILE_DISABLE": "1",
    }


# How engines are started, under which name of the model and on which port.
STARTS = {"vllm": vllm}


class Engine:
    def __init__(self, name, out):
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = "of-the-engine"
        command, environment = STARTS[name](self.model, self.port)
        self.command = " ".join(command)
        self.log = open(out / f"{name}.log", "w")
        self.process = subprocess.Popen(command, env=os.environ | environment, stdout=self.log, stderr=subprocess.STDOUT,
                                        start_new_session=True)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                if call(self.url, "GET", "/v1/models")[0] == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{name} does not start: see {self.log.name}")
            time.sleep(0.5)

    def version(self):
        script = "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu'))"
        run = subprocess.run([ENGINES / self.name / "bin/python", "-c", script], stdout=subprocess.PIPE, text=True)
        return run.stdout.strip()

    def stop(self, sign=15):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        self.process.wait()


class Baton:
    def __init__(self, binary, engine, out):
        self.folder = out / f"fleet-{engine.name}"
        self.folder.mkdir(exist_ok=True)
        document = {
            "version": 1, "model": {"id": "of-baton"}, "router": {"listen": "127.0.0.1:0"},
            "conductor": {"listen": "127.0.0.1:0"},
            "pools": [{"name": "servers", "role": "both",
                       "engine": {"kind": "openai", "url": engine.url, "model": engine.model}}],
        }
        path = self.folder / "fleet.yaml"
        path.write_text(json.dumps(document))
        self.binary = str(pathlib.Path(binary).resolve())
        self.log = open(out / f"baton-{engine.name}.log", "w")
        self.process = subprocess.Popen([self.binary, "up", str(path)], cwd=self.folder, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"no ready line but {line!r}: see {self.log.name}")
        words = line.split()
        self.url = words[1].removesuffix("/v1")
        self.conductor = next(word for word in words if word.startswith("conductor=")).removeprefix("conductor=")

    def status(self):
        run = subprocess.run([self.binary, "status", "--json", "--conductor", self.conductor],
                             stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout)["workers"][0]

    def stop(self):
        self.process.terminate()
        self.process.wait()


def connect(url, timeout=120):
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=timeout)


def call(url, method, path, body=None):
    connection = connect(url)
    try:
        connection.request(method, path, None if body is None else json.dumps(body),
                           {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text
    finally:
        connection.close()


def events(url, path, body):
    """The data of a stream, and the times at which it came; ends at [DONE]."""
    connection = connect(url)
    connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise Unlike(f"{answer.status}: {answer.read()[:300]}")
    found, last = [], b""
    for line in answer:
        last = line.strip() or last
        if line.startswith(b"data: "):
            if line.strip() == b"data: [DONE]":
                connection.close()
                return found
            found.append((time.monotonic(), json.loads(line[6:])))
    raise Unlike(f"the stream ended without [DONE], after {len(found)} events, with {last[-300:]}")


def chat(model, **more):
    messages = [{"role": "user", "content": "Tell me a story."}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def ok(answer):
    status, body = answer
    expect(status == 200, f"{status}: {str(body)[:300]}")
    return body


class Checks:
    def __init__(self, engine, baton):
        self.engine, self.baton = engine, baton

    def both(self, path, body):
        """What both answer to the same request, each under its own name of the model."""
        straight = call(self.engine.url, "POST", path, {**body, "model": self.engine.model})
        through = call(self.baton.url, "POST", path, {**body, "model": "of-baton"})
        return straight, through

    def models(self):
        names = [model["id"] for model in ok(call(self.baton.url, "GET", "/v1/models"))["data"]]
        expect(names == ["of-baton"], names)

    def a_whole_chat(self):
        straight, through = map(ok, self.both("/v1/chat/completions", chat("")))
        texts = [body["choices"][0]["message"]["content"] for body in (straight, through)]
        expect(texts[0] == texts[1] and through["model"] == "of-baton", texts)
        expect(straight["usage"]["completion_tokens"] == through["usage"]["completion_tokens"], through["usage"])
        return repr(texts[1][:40])

    def a_streamed_chat(self):
        events(self.engine.url, "/v1/chat/completions", chat(self.engine.model))
        whole = ok(call(self.baton.url, "POST", "/v1/chat/completions", chat("of-baton")))
        body = chat("of-baton", stream_options={"include_usage": True})
        told = events(self.baton.url, "/v1/chat/completions", body)
        deltas = [chunk["choices"][0]["delta"].get("content") or "" for _, chunk in told if chunk["choices"]]
        expect("".join(deltas) == whole["choices"][0]["message"]["content"], deltas)
        expect(all(chunk["model"] == "of-baton" for _, chunk in told), told[0])
        usage = [chunk["usage"] for _, chunk in told if chunk.get("usage")]
        return f"{len(told)} events, usage {'told' if usage else 'not told by this engine'}"

    def a_completion_with_logprobs(self):
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
        straight, through = map(ok, self.both("/v1/completions", body))
        told = [body["choices"][0]["logprobs"]["tokens"] for body in (straight, through)]
        expect(told[0] == told[1] and len(told[0]) >= 8, told)

    def a_completion_of_token_ids(self):
        body = {"prompt": [0, 40, 50, 60, 70], "max_tokens": 8, "temperature": 0}
        straight, through = self.both("/v1/completions", body)
        expect(straight[0] == through[0], (straight, through))
        if straight[0] != 200:
            return f"the engine refuses it with {straight[0]}, and so does Baton"
        expect(straight[1]["choices"][0]["text"] == through[1]["choices"][0]["text"], through)

    def an_answer_of_a_schema(self):
        form = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
        body = chat("of-baton", response_format=form, max_tokens=200)
        text = ok(call(self.baton.url, "POST", "/v1/chat/completions", body))["choices"][0]["message"]["content"]
        answer = json.loads(text)
        expect(answer["name"] in ("Ann", "Bob") and isinstance(answer["old"], bool), text)
        return text.replace("\n", " ")

    def a_tool_call(self):
        choice = {"type": "function", "function": {"name": "look_up"}}
        body = chat("", tools=[TOOL], tool_choice=choice, max_tokens=200)
        calls = [ok(answer)["choices"][0]["message"]["tool_calls"][0]["function"]
                 for answer in self.both("/v1/chat/completions", body)]
        expect(calls[0] == calls[1] and calls[1]["name"] == "look_up", calls)
        streamed = []
        for url, model in [(self.engine.url, self.engine.model), (self.baton.url, "of-baton")]:
            told = events(url, "/v1/chat/completions", {**body, "model": model})
            streamed.append([call["function"].get("arguments") or "" for _, chunk in told for one in chunk["choices"]
                             for call in one["delta"].get("tool_calls") or []])
        expect("".join(streamed[0]) == "".join(streamed[1]) != "", streamed)
        return f"{calls[1]['arguments']}; streamed: {''.join(streamed[1])}, in {len(streamed[1])} parts"

    def several_choices(self):
        answers = self.both("/v1/chat/completions", chat("", n=2, temperature=1, seed=3))
        if answers[0][0] == 200:
            count = len(answers[0][1]["choices"])
            expect(len(ok(answers[1])["choices"]) == count, answers)
            return f"{count} choices"
        expect(answers[0][0] == answers[1][0], answers)
        return f"the engine refuses it with {answers[0][0]}, and so does Baton"

    def what_is_wrong_is_refused(self):
        for body, status, param in [
            (chat("nobody"), 404, "model"),
            (chat("of-baton", temperature="warm"), 400, "temperature"),
            (chat("of-baton", magic=1), 400, "magic"),
            (chat("of-baton", max_tokens=10**6), 400, None),
            (chat("of-baton", messages=[]), 400, None),
        ]:
            told, answer = call(self.baton.url, "POST", "/v1/chat/completions", body)
            expect(told == status, (status, told, answer))
            error = answer["error"]
            expect({"message", "type", "param", "code"} == set(error), error)
            expect(param is None or error["param"] == param, error)

    def other_paths(self):
        said = []
        for path, body in [
            ("/tokenize", {"prompt": "Hello"}),
            ("/v1/embeddings", {"input": "Hello"}),
            ("/v1/responses", {"input": "Hello", "max_output_tokens": 8, "store": False, "temperature": 0}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello"}]}),
        ]:
            straight, through = self.both(path, body)
            expect(straight[0] == through[0] or (straight[0], through[0]) == (422, 400), (path, straight, through))
            if straight[0] == 200:
                same = {"tokens", "count", "input_tokens"} & straight[1].keys()
                expect(all(straight[1][key] == through[1][key] for key in same), (path, straight, through))
            said.append(f"{path} {through[0]}")
        return ", ".join(said)

    def who_leaves_is_felt(self):
        """A stream that is left does not keep the engine busy: another request is served as quickly as before."""
        begun = time.monotonic()
        ok(call(self.baton.url, "POST", "/v1/completions", {"model": "of-baton", "prompt": PROMPT, "max_tokens": 4}))
        alone_s = time.monotonic() - begun
        connection = connect(self.baton.url)
        body = {"model": "of-baton", "prompt": PROMPT, "max_tokens": 3500, "temperature": 1, "stream": True}
        body["ignore_eos"] = True
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        expect(answer.status == 200, answer.status)
        for _ in range(10):
            answer.readline()
        busy = self.running()
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        left = time.monotonic()
        while self.running():
            expect(time.monotonic() < left + 10, "the engine works on for 10 s")
            time.sleep(0.02)
        free_s = time.monotonic() - left
        ok(call(self.baton.url, "POST", "/v1/completions", {"model": "of-baton", "prompt": PROMPT, "max_tokens": 4}))
        after_s = time.monotonic() - left - free_s
        expect(after_s < alone_s + 5, f"{after_s:.2f} s instead of {alone_s:.2f}")
        told = f"let go after {free_s:.2f} s" if busy else "the engine does not tell what it runs"
        return f"{told}; the next request took {after_s:.2f} s (before: {alone_s:.2f})"

    def running(self):
        """Requests that the engine says it runs; none where it does not say."""
        status, text = call(self.engine.url, "GET", "/metrics")
        if status != 200 or not isinstance(text, str):
            return 0
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def many_at_once(self):
        texts, failures = {}, []

        def one(n):
            try:
                body = {"model": "of-baton", "prompt": f"{n} {PROMPT}", "max_tokens": 32, "temperature": 0}
                told = events(self.baton.url, "/v1/completions", body)
                texts[n] = "".join(chunk["choices"][0]["text"] for _, chunk in told if chunk["choices"])
            except Exception as error:  # Told below, with what it was about.
                failures.append((n, repr(error)))

        begun = time.monotonic()
        threads = [threading.Thread(target=one, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        seen = 0
        while any(thread.is_alive() for thread in threads):
            seen = max(seen, self.baton.status().get("requests_running") or 0)
            time.sleep(0.05)
        expect(not failures and len(texts) == 16, failures)
        return f"16 streams in {time.monotonic() - begun:.1f} s, Baton's worker saw {seen} running"

    def a_dead_engine_is_told_honestly(self):
        """Kills it in mid-stream: goes last."""
        connection = connect(self.baton.url)
        body = {"model": "of-baton", "prompt": PROMPT, "max_tokens": 3500, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        for _ in range(6):
            answer.readline()
        self.engine.stop(9)
        killed = time.monotonic()
        rest = answer.read().decode()
        last = rest.strip().split("\n\n")[-1]
        expect('"worker_lost"' in last, last[-300:])
        told_s = time.monotonic() - killed
        status, answer = call(self.baton.url, "POST", "/v1/completions",
                              {"model": "of-baton", "prompt": PROMPT, "max_tokens": 4})
        expect(status == 503 and answer["error"]["code"] == "no_worker", (status, answer))
        return f"the stream ended with an error after {told_s:.2f} s, the next request with 503"


CHECKS = ["models", "a_whole_chat", "a_streamed_chat", "a_completion_with_logprobs", "a_completion_of_token_ids",
          "an_answer_of_a_schema", "a_tool_call", "several_choices", "what_is_wrong_is_refused", "other_paths",
          "who_leaves_is_felt", "many_at_once", "a_dead_engine_is_told_honestly"]


def main(binary, out, names):
    out = pathlib.Path(out).resolve()
    failed = 0
    for name in names:
        begun = time.monotonic()
        engine = Engine(name, out)
        started_s = time.monotonic() - begun
        lines = [f"# {engine.version()}, {datetime.date.today()}", "", f"`{engine.command}`, listening after {started_s:.0f} s.",
                 "", "| check | |", "|---|---|"]
        print(f"== {lines[0][2:]}", flush=True)
        baton = Baton(binary, engine, out)
        try:
            checks = Checks(engine, baton)
            for check in CHECKS:
                try:
                    said = getattr(checks, check)() or "as straight"
                except (Unlike, OSError, KeyError, IndexError, TypeError, ValueError, http.client.HTTPException) as error:
                    failed += 1
                    said = f"**FAILED**: {type(error).__name__}: {str(error)[:1500]}"
                print(f"{check}: {said}", flush=True)
                said = said.replace("|", "\\|")
                lines.append(f"| {check.replace('_', ' ')} | {said} |")
        finally:
            baton.stop()
            engine.stop()
            (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
