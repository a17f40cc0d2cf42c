"""A server that speaks as much of OpenAI's protocol as it must, and dies of prompts that say `deadly`. Usage: deadly_server.py PORT"""
import http.server
import json
import os
import signal
import sys

MODEL = {"id": "tiny", "object": "model", "created": 1, "owned_by": "test"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [MODEL]})
        else:
            self.answer(404, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if b"deadly" in body:
            # As by a fault of the engine: no handler runs, no connection is closed in good order.
            os.kill(os.getpid(), signal.SIGKILL)
        message = {"role": "assistant", "content": "well"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.answer(200, {"id": "c", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice],
                          "usage": usage})

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
