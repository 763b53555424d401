"""An LLM's endpoint without an LLM: it serves the replies of the recorded night, in their order.

    python tests/recorded_llm.py [PORT] &
    python autoresearch.py --base-url http://127.0.0.1:8123/v1

The replies are a real model's; whether they help is measured on your machine. A reply is an edit
of an incumbent. If that was not kept here, or not yet, the driver has to ask again.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import autoresearch as ar  # noqa: E402

REPLIES = json.loads((TESTS / "night_replies.json").read_text("utf-8"))
PATIENCE = 300      # seconds after which a reply that fits no incumbent is left out


class Endpoint(BaseHTTPRequestHandler):
    """OpenAI's GET /models and POST /chat/completions, as far as the driver needs them."""

    since = time.monotonic()        # since when the next reply waits for its incumbent

    def do_GET(self):
        self.send(200, {"data": [{"id": "recorded"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        incumbent = body["messages"][1]["content"].split("```python\n")[1].split("\n```")[0]
        try:
            ar.apply_reply(REPLIES[0], incumbent)
        except (ar.Unusable, IndexError):
            if REPLIES and time.monotonic() - Endpoint.since > PATIENCE:
                Endpoint.since = time.monotonic()
                del REPLIES[0]
            why = f"{len(REPLIES)} replies are left, and the next one is for another incumbent"
            return self.send(503, {"error": {"message": why}})
        Endpoint.since = time.monotonic()
        message = {"role": "assistant", "content": REPLIES.pop(0)}
        self.send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})

    def send(self, code: int, data: dict):
        content = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Print nothing: this may run in the driver's terminal."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8123
    try:
        HTTPServer(("127.0.0.1", port), Endpoint).serve_forever()
    except OSError as error:
        sys.exit(f"recorded_llm.py: port {port}: {error.strerror}: give another one")
