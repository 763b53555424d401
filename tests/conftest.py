"""What the tests share: a small corpus, a folder to research in, and a scripted LLM."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

# A job in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)        # nohup ignores it

# Several processes share the cores; to be said before anything imports torch.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "CUDA_VISIBLE_DEVICES": "-1"}    # the setting for a CPU, everywhere

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # so that a test can say: import autoresearch

# A train.py that learns something in half a second: the next token from this one alone.
TINY = '''
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare

WIDTH = 16              # channels
LR = 0.02               # of each weight
BATCH = 8               # windows in a step


def train():
    model = nn.Sequential(nn.Embedding(prepare.VOCAB_SIZE, WIDTH),
                          nn.Linear(WIDTH, prepare.VOCAB_SIZE)).to(prepare.DEVICE)
    weights = list(model.parameters())
    for x, y, progress in prepare.batches(BATCH, 32):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights)):
            weight.data -= LR * slope.sign()        # torch.optim takes a second to import
    print(f"loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    prepare.by_hand(__file__)
'''


SCRIPTS = "autoresearch.py", "prepare.py", "program.md"


def pytest_configure(config: pytest.Config):
    """Let a file that cannot be imported stop only its own tests: other tasks lack a tokenizer."""
    config.option.continue_on_collection_errors = True


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Path:
    """The scripts as they are when the tests start."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "tests" / "scripted_run.py", folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, scripts) -> tuple[Path, Path, Path]:
    """1.3 MB of text, the cache that it is prepared in, and the scripts."""
    text, cache = map(tmp_path_factory.mktemp, ("text", "cache"))
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < 1_300_000:
            shutil.copy(path, text)
            size += path.stat().st_size
    subprocess.run([sys.executable, scripts / "prepare.py", "--data", text], check=True,
                   env=os.environ | {"AUTORESEARCH_CACHE": str(cache)}, capture_output=True)
    return text, cache, scripts


class Lab:
    """A copy of the project in a folder of its own, and its driver as a subprocess."""

    def __init__(self, folder: Path, scripts: Path, prepare: str = "prepare.py"):
        self.folder = folder
        for name in SCRIPTS:
            shutil.copy(scripts / name, folder)
        shutil.copy(scripts / prepare, folder / "prepare.py")
        self.train.write_text(TINY)
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("OPENAI_", "ANTHROPIC_"))}

    @property
    def train(self) -> Path:
        return self.folder / "train.py"

    def command(self, *flags: object) -> list[str]:
        return [sys.executable, "autoresearch.py", *map(str, flags)]

    def start(self, *flags: object, **more) -> subprocess.Popen:
        return subprocess.Popen(self.command(*flags), cwd=self.folder, env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)

    def drive(self, *flags: object, code: int = 0) -> str:
        """Run the driver to its end and return all that it printed."""
        process = self.start(*flags)
        output = process.communicate(timeout=150)[0]
        assert process.returncode == code, output
        assert "Traceback" not in output, output
        return output

    def rows(self) -> list[dict[str, str]]:
        path = self.folder / "results.tsv"
        if not path.exists():
            return []
        names, *lines = (line.split("\t") for line in path.read_text().splitlines())
        return [dict(zip(names, line)) for line in lines]

    def wait_for(self, condition, what: str, seconds: float = 60):
        """Wait until `condition()` is true, and return what it returned."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):
                if value := condition():
                    return value
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture
def lab(tmp_path, corpus) -> Lab:
    """A lab where nothing is measured yet, and runs are real."""
    lab = Lab(tmp_path, corpus[2])
    lab.text = corpus[0]
    lab.env |= {"AUTORESEARCH_CACHE": str(corpus[1])}
    return lab


@pytest.fixture(scope="session")
def baseline(tmp_path_factory, scripts) -> Path:
    """A folder with a baseline of scripted runs, and nothing else."""
    lab = Lab(tmp_path_factory.mktemp("baseline"), scripts, "scripted_run.py")
    lab.drive("--experiments", 1)
    shutil.rmtree(lab.folder / "runs" / "0001")
    ledger = lab.folder / "results.tsv"
    ledger.write_text("".join(ledger.read_text().splitlines(True)[:2]))
    lab.train.write_text(TINY)
    return lab.folder


@pytest.fixture
def measured(tmp_path, scripts, baseline) -> Lab:
    """A lab whose baseline is measured. scripted_run.py is its prepare.py: runs take no time."""
    shutil.copytree(baseline, tmp_path, dirs_exist_ok=True)
    return Lab(tmp_path, scripts, "scripted_run.py")


class ScriptedLLM(http.server.ThreadingHTTPServer):
    """An HTTP server on loopback that answers as told, in both wire formats.

    `script` holds what to answer, one entry a request; the last is repeated. An entry is a reply's
    text, or a function that is given the handler and answers by itself.
    """

    daemon_threads = True

    def __init__(self, script: list):
        self.script, self.requests, self.lock = script, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def anthropic_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/anthropic/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: ScriptedLLM

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send(200, {"data": [{"id": "scripted"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            script = self.server.script
            answer = script.pop(0) if len(script) > 1 else script[0]
        if callable(answer):
            return answer(self)
        self.reply(answer)

    def reply(self, text: str | None, **changed):
        """Answer with a reply in the wire format of the path that was asked."""
        if "anthropic" in self.path:
            data = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn",
                    "usage": {"input_tokens": 10, "cache_creation_input_tokens": 20,
                              "cache_read_input_tokens": 70, "output_tokens": 30}}
        else:
            data = {"choices": [{"message": {"role": "assistant", "content": text},
                                 "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 30,
                              "prompt_tokens_details": {"cached_tokens": 70}}}
        self.send(200, data | changed)

    def send(self, code: int, data: dict | str, **headers: str):
        content = data if isinstance(data, str) else json.dumps(data)
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())


@pytest.fixture
def llm():
    """Start a scripted LLM: llm([reply, reply, ...])."""
    servers = []

    def start(script: list) -> ScriptedLLM:
        servers.append(ScriptedLLM(script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def edit(search: str, replace: str, description: str = "an edit") -> str:
    """A reply as the rules ask for it."""
    return (f"DESCRIPTION: {description}\n\nIt should help.\n\n<<<<<<< SEARCH\n{search}\n=======\n"
            f"{replace}\n>>>>>>> REPLACE\n")
