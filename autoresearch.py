"""autoresearch: an LLM does machine-learning research on its own.

    python autoresearch.py                 # until Ctrl-C; the same command goes on
    python autoresearch.py --confirm 5     # measure the gain anew, on fresh seeds

It reads program.md, asks an LLM for one change to train.py, trains the changed file as a
subprocess under a wall-clock cap, keeps the change if it helped, appends a row to results.tsv,
and goes on all night. Lab.research, in section 9, is that sentence as code.

Experiment   one candidate train.py and all that was done with it; runs/0007/ is experiment 7
Run          one training of it with one seed
Incumbent    the best train.py so far; the file train.py always is the incumbent
Baseline     experiment 0: train.py as it was at the first start
Researcher   who proposed an experiment: llm, search, human, or baseline
Noise        the standard deviation of val_bpb between seeds
"""

import argparse
import ast
import collections
import contextlib
import difflib
import hashlib
import html
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import requests

try:
    import fcntl
except ImportError:
    raise SystemExit("autoresearch.py: Windows has no fcntl: start it inside WSL2") from None

WIN = 1.0               # standard errors by which longer code has to win, after each of its runs
RUNS = 2                # runs that a candidate has to win; RUNS = 1, WIN = 0 is the greedy rule
BASELINE_RUNS = 3       # runs of the baseline, for the first estimate of the noise
NOISE_FILES = 6         # newest files with several runs, for the noise: other code has another
RECHECK = 8             # discards in a row after which the incumbent runs once more
IDLE_SHARE = 0.2        # of the budget: an accelerator idle for that long is lent to the search
RETURNS = 2             # times that a proposal goes back to the LLM with what was wrong
LONGEST_PAUSE = 300     # seconds between two requests while the LLM is away, or answers in vain
MORE_ROOM = 64_000      # output tokens of the second try, after thinking used up the first
DEATHS = 2              # times that the driver dies under a candidate, which then is a crash
LOG_LIMIT = 10_000_000  # bytes of output after which a run is ended; a usual one prints 10 kB
START_LIMIT = 300       # seconds until a run on this machine says that it has started
GRACE = 3               # seconds from SIGTERM to SIGKILL
FALSE_STARTS = 5        # runs in a row that do not start, after which the machine is to blame
HISTORY = 100           # at least so many in a prompt; of older ones only what was kept
IDEAS = 20              # at least so many with their reasons

COLUMNS = ("commit val_bpb memory_gb status description experiment by runs test_bpb reason "
           "train_seconds total_seconds input_tokens output_tokens finished").split()
TRAIN, PROGRAM, LEDGER, PLOT = map(Path, "train.py program.md results.tsv progress.svg".split())
FOLDER = Path("runs")
CONDITIONS, CONFIRMED = FOLDER / "conditions.json", FOLDER / "confirmed.json"
COMPARED = "data sha256 device threads torch budget seq_len vocab_size prepare".split()
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Stop(Exception):
    """Ends the driver with one line: what happened, and what to type next."""


class Unusable(Exception):
    """No score: Unusable(why, the end of its log, is it the candidate's fault?)."""


def write_whole(path: Path, content: str | dict):
    """Write text, or data as JSON. After a kill the file is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    temporary.write_text(text, "utf-8", "surrogateescape")
    with open(temporary) as file:
        os.fsync(file.fileno())     # else a crash of the machine may leave the new name empty
    os.replace(temporary, path)


def read(path: Path) -> str:
    return path.read_text("utf-8", "surrogateescape")


def read_json(path: Path) -> dict:
    return json.loads(read(path)) if path.exists() else {}


def one_line(text: str, limit: int = 300) -> str:
    """Return text as one line without control characters, tabs or double quotes, cut at limit."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace('"', "'")
    return line if len(line) <= limit else line[:limit - 3] + "..."


# ---- 1  An experiment ---------------------------------------------------------------------------

@dataclass(eq=False)    # compared and hashed by identity
class Experiment:
    """One candidate and all that was done with it. runs/NNNN/experiment.json is exactly this."""

    number: int
    by: str                     # the researcher
    description: str = ""
    idea: str = ""              # why it should help, in the LLM's words
    source: str = ""            # the candidate train.py, once there is one
    fingerprint: str = ""       # of the source, once it has passed the screen
    base: int = 0               # the incumbent that it is a change of
    turns: list[str] = field(default_factory=list)  # reply, complaint, reply, ...
    runs: list[dict] = field(default_factory=list)  # reports of prepare.py, with scores
    fresh: dict[str, list] = field(default_factory=dict)    # of --confirm: incumbent -> reports
    tries: int = 0              # runs begun: the number of the next one's log and seed
    ended: int = 0              # runs that ended; if below tries, the driver died during one
    model: str = ""             # that was asked
    room: int = 0               # output tokens to ask for; 0: as usual; below 0: tried in vain
    calls: int = 0              # answers of the LLM, also those that were cut or empty
    input_tokens: int = 0
    cached_tokens: int = 0      # of the input tokens
    output_tokens: int = 0

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.number:04d}"

    @property
    def scores(self) -> list[float]:    # the newest: the machine may have changed since others
        return [run["val_bpb"] for run in self.runs[-max(RUNS, BASELINE_RUNS):]]

    @property
    def drift(self) -> str:     # a sentence if it trained at another speed when it was run anew
        first = RUNS if self.number else BASELINE_RUNS
        old, new = speed(self.runs[:first]), speed(self.runs[first:][-1:])
        change = new / old - 1 if old and new else 0
        words = f"the machine has changed: #{self.number} now trains on {change:+.0%} tokens/s"
        return words if abs(change) > 0.1 else ""

    def save(self):
        if self.source:
            write_whole(self.folder / "train.py", self.source)
        write_whole(self.folder / "experiment.json", vars(self))


def saved_experiments() -> Iterator[Experiment]:
    """Yield what is in runs/, oldest first; folders of an older layout are left alone."""
    for path in sorted(FOLDER.glob("*/experiment.json")):
        with contextlib.suppress(TypeError, ValueError):
            yield Experiment(**read_json(path))


def speed(runs: list[dict]) -> float:
    """Return the tokens a second of some runs; 0.0 if only their scores are known."""
    seconds = sum(run.get("train_seconds", 0) for run in runs)
    return sum(run.get("num_tokens", 0) for run in runs) / (seconds or 1)


# ---- 2  Ledger: results.tsv, one row an experiment ----------------------------------------------

def scores_of(row: dict[str, str]) -> list[float]:
    return [float(score) for score in row["runs"].split(",") if score]


def read_ledger(repair: bool) -> list[dict[str, str]]:
    """Return the rows. A last line without its end is not one: `repair` cuts it off the file."""
    *lines, torn = read(LEDGER).split("\n") if LEDGER.exists() else [""]
    if torn and repair:     # its experiment has no row now, and is judged again
        write_whole(LEDGER, "\n".join([*lines, ""]))
        say(f"{LEDGER}: cut off a partly written last line")
    rows = [dict(zip(COLUMNS, line.split("\t"))) for line in lines[1:]]
    for number, row in enumerate(rows, 2):
        try:
            int(row["experiment"]), float(row["val_bpb"]), scores_of(row), row["finished"]
        except (KeyError, ValueError):
            raise Stop(f"{LEDGER} line {number} is not a row: mend or delete it") from None
    return rows


def append_row(row: dict[str, str]):
    """Append a row with one write and one fsync: a kill leaves all of it or none."""
    with open(LEDGER, "ab", buffering=0) as file:
        header = "" if file.tell() else "\t".join(COLUMNS) + "\n"
        file.write((header + "\t".join(row[name] for name in COLUMNS) + "\n").encode())
        os.fsync(file.fileno())


# ---- 3  Judge: is it better, or was it luck? ----------------------------------------------------

def pooled_noise(groups: list[list[float]]) -> float:
    """Return the pooled standard deviation of files that ran repeatedly; 0.0 while none has."""
    squares = sum((x - fmean(group)) ** 2 for group in groups for x in group)
    freedom = sum(len(group) - 1 for group in groups if group)
    return math.sqrt(squares / freedom) if freedom else 0.0


def noise_of(rows: list[dict[str, str]]) -> float:
    return pooled_noise([scores_of(row) for row in rows if "," in row["runs"]][-NOISE_FILES:])


def standard_error(k: int, n: int, noise: float) -> float:  # of a difference of two means
    return noise * math.sqrt(1 / k + 1 / n)


def code_lines(source: str) -> int:     # comments, blank lines and formatting do not count
    return len(ast.unparse(ast.parse(source)).splitlines())


def judge(candidate: list[float], incumbent: list[float], noise: float, longer: bool) -> str:
    """Return "discard", "again" (run it on a fresh seed) or "keep". Lower scores are better.

    More code has to show that it helps, by WIN standard errors at each look. A knob, a swap or a
    simplification needs only to be better, RUNS times. Against an incumbent of 3 runs, candidates
    with a true gain of 0, 1, 2 and 4 noises are kept in this many cases (simulated):

        more code       10%  38%  74%  99%
        anything else   39%  77%  95% 100%
        greedy          50%  81%  96% 100%      one run, whatever is lower
    """
    if not candidate:
        return "again"
    gain = fmean(incumbent) - fmean(candidate)
    needed = WIN * standard_error(len(candidate), len(incumbent), noise) if longer else 0.0
    if not (gain > 0 and gain >= needed):
        return "discard"
    return "again" if len(candidate) < RUNS else "keep"


# ---- 4  Screen: sloppy and score-gaming proposals end here, before they cost a run --------------

# Malware does not end here. First this reads the text; before a run refuse_modules() in prepare.py
# follows what names lead to.
MODULES = "|".join("""__future__ abc bisect cmath collections contextlib copy dataclasses enum
    functools gc heapq itertools json math numpy operator prepare random re statistics string time
    torch types typing warnings""".split())
DUNDERS = """add|call|class|constants|doc|enter|exit|file|future|getitem|init|iter|len|main|name|
    new|next|post_init|repr|setitem|slots|str|version"""    # they give what type(x) gives
IMPORT = ast.Import, ast.ImportFrom
REFUSED = [     # kind of node, pattern of its text, why. Strings too: str.format() reads attributes
    (IMPORT, rf"^(import (.*, )?|from )(?!({MODULES})\b)|\*$", "not one of the modules on offer"),
    (ast.Name, r"^(open|exec|eval|compile|globals|locals|vars|getattr|setattr|delattr)$",
     "no files, no text that runs as code, no attributes by computed names"),
    (ast.Attribute, r"""(?s)([^'"]|^f.*)\.format(_map)?$""", "no computed formats: use f-strings"),
    (ast.AST, r"\b(default_generators?|manual_seed\w*|\w*rng_state\w*|set_num_\w*threads)\b",
     "the driver chooses the seed and the threads"),
    (ast.AST, rf"""(?x) __(?! ({DUNDERS}) __)[a-z]\w*?__ | \b(from_file | tofile | [acgt]\w_frame
        | f_(back | builtins | globals | locals))\b""", "no files, no way into the interpreter")]


def as_text(node: ast.AST) -> str:
    """Return what names something as it stands, of other nodes their own words."""
    if isinstance(node, (*IMPORT, ast.Attribute, ast.Global, ast.Nonlocal, ast.pattern)):
        return ast.unparse(node)
    return " ".join(word for word in vars(node).values() if isinstance(word, str))


def screen(source: str) -> str:
    """Return a candidate's fingerprint: comments, docstrings and formatting do not change it."""
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):     # a docstring may say what it likes
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not isinstance(line, ast.Expr)
                             or not isinstance(line.value, ast.Constant)]
        code = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unusable(f"syntax error: {error}: {getattr(error, 'text', '')}".strip()) from None
    for node in ast.walk(tree):
        for kind, pattern, why in REFUSED:
            if isinstance(node, kind) and re.search(pattern, as_text(node)):
                line = source.splitlines()[node.lineno - 1].strip()
                raise Unusable(f"not allowed in line {node.lineno}: {line}: {why}")
    if not re.search(r"(?m)^def train\(", code):
        raise Unusable("train.py has to define train() -> torch.nn.Module at top level")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


# ---- 5  Run: one training in a process group of its own, under a cap ----------------------------

def run_environment(**more: str) -> dict[str, str]:
    """Return the environment for runs: ours without anything that looks like a secret."""
    secret = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT|_PAT$|^OPENAI|^ANTHROPIC", re.I)
    kept = {name: value for name, value in os.environ.items() if not secret.search(name)}
    return kept | {"PYTHONUNBUFFERED": "1"} | more


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start a command; at the end of the block, end it and all that it has started."""
    with subprocess.Popen(command, env=environment, bufsize=0, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"\n")      # hello: when this pipe closes, a run ends itself
            yield process
        finally:
            for number in signal.SIGTERM, signal.SIGKILL:
                # OSError: all have ended. While one lives, the group's id is not reused.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE)


def lines_of(process: subprocess.Popen) -> Iterator[bytes]:
    """Yield what a process prints, line by line, until it ends; b"" while it prints nothing."""
    os.set_blocking(process.stdout.fileno(), False)
    chunk, rest, exited = b"", b"", False
    while chunk or not exited:      # a child of it that holds the pipe is not waited for
        exited = process.poll() is not None     # asked first: then all it wrote is in the pipe
        chunk = process.stdout.read(1 << 16) or b""
        *lines, rest = re.split(b"[\r\n]", rest + chunk)
        if len(rest) > 1 << 16:     # a line whose end may never come
            lines, rest = [*lines, rest], b""
        yield from lines or [b""]
        if not chunk:
            time.sleep(0.05)
    yield rest


def run_command(command: list[str], log: Path, environment: dict[str, str], patience: float,
                stop: threading.Event, on_event: Callable[[dict, str], None]) -> dict:
    """Run a command; return its report, or why there is none: "reason", "started" and "log".

    An event is a line "KEY {json}" of prepare.py. One with a "limit" begins a phase: the next has
    to begin within so many seconds, the first within `patience`.
    """
    key, deadline = os.urandom(16).hex(), time.monotonic() + patience
    event, where = {}, "before it started"
    printed = collections.deque([""], maxlen=30)    # the last lines, harmless in a prompt
    with open(log, "wb") as file, started([*command, "--key", key], environment) as process:
        for line in lines_of(process):
            cause = ("timeout" if time.monotonic() > deadline else
                     f"flooded its log: {LOG_LIMIT} bytes" if file.tell() > LOG_LIMIT else "")
            if cause or stop.is_set():
                break
            # The candidate does not know the key, so what follows it is prepare.py's.
            words, _, told = line.partition(key.encode())
            if words.strip():
                file.write(words + b"\n")
                printed.append(one_line(str(words, "utf-8", "replace"), 200).replace("`", "'"))
            try:
                event = json.loads(told)
            except ValueError:      # no event, or one that a launcher damaged
                continue
            if "limit" in event:
                where = f"in {event['event']}"
                deadline = time.monotonic() + event["limit"]
            on_event(event, printed[-1][:80])
    code = process.returncode
    if event.get("event") == "report" and code == 0:    # it counts only after a normal end
        return event | {"reason": "", "started": True}
    how = f"signal {-code}{' (out of memory?)' * (code == -9)}" if code < 0 else f"code {code}"
    why = event.get("reason") or (
        f"{cause or 'ended without a report'}, {where}, by {how}: {printed[-1][:80]}")
    return {"reason": one_line(why), "started": bool(event), "log": "\n".join(printed).strip()}


# ---- 6  LLM: OpenAI-compatible chat completions and Anthropic messages, over raw HTTP -----------

Answer = collections.namedtuple(
    "Answer", "text whole finish input_tokens cached_tokens output_tokens raw")
# Looked up on 2026-11-25: Anthropic's migration guide of Sonnet 5.5, OpenAI's deprecations.
DEFAULT = {"anthropic": "claude-sonnet-5-5", "openai": "gpt-5.5"}
NO_CHAT = re.compile("embed|bge|rerank|whisper|tts|audio|speech|moderation|dall-e|image", re.I)
# The words of a refusal of a long prompt. With max_tokens in them they are about the reply.
LONG = re.compile(r"context|^(?!.*max_\w*tokens).*(too (long|large)|input length|\btokens\b)", re.I)


class Away(Exception):
    """No answer now: Away(why, seconds that it asks us to wait, is the prompt too long?)."""


def read_answer(data: dict) -> Answer:
    """Read a response in either format. A whole one is neither cut nor empty nor refused."""
    if not any(map(data.get, ("choices", "content", "usage"))):
        raise ValueError("an error, in spite of its HTTP code")
    choice = next(iter(data.get("choices") or []), {})
    reply = data | choice | (choice.get("message") or {})       # one flat dict, as Anthropic's is
    text = reply.get("content") or ""
    if not isinstance(text, str):       # but parts, of which a thought has no "text"
        text = "".join(part.get("text") or "" for part in text)
    thought = str(reply.get("reasoning_content") or reply.get("reasoning"))
    if not text.strip() and re.search(r"<<< ?SEARCH|```.*^def train\b", thought, re.S | re.M):
        text = thought          # some servers file a whole reply under reasoning
    ends = map(reply.get, ("refusal", "error", "finish_reason", "stop_reason"))
    finish = one_line(str(next(filter(None, (data.get("error"), *ends)), "")))
    whole = finish.lower() in ("", "stop", "end_turn", "stop_sequence", "eos", "eos_token")
    # The counts may be strings, floats or null. Of equal names the first counts.
    counts = re.findall(r'"(\w+_tokens)": "?(\d{1,12})', json.dumps(data.get("usage")))
    usage = collections.Counter({name: int(count) for name, count in reversed(counts)})
    cached = usage["cached_tokens"] or usage["cache_read_input_tokens"]
    # OpenAI's prompt_tokens include the cached ones, Anthropic's input_tokens do not.
    fresh = usage["input_tokens"] + usage["cache_creation_input_tokens"]
    return Answer(text.encode("utf-8", "replace").decode(), whole and bool(text.strip()), finish,
                  usage["prompt_tokens"] or fresh + cached, cached,
                  usage["completion_tokens"] or usage["output_tokens"], data)


class LLM:
    """A model behind an endpoint."""

    def __init__(self, base_url: str | None, model: str | None):
        env = os.environ.get
        url = base_url or env("OPENAI_BASE_URL") or ""
        theirs = env("ANTHROPIC_BASE_URL") or env("ANTHROPIC_API_KEY")
        self.claude = "anthropic" in url if url else bool(theirs)
        owner = "anthropic" if self.claude else "openai"
        url = url or env(f"{owner.upper()}_BASE_URL") or f"https://api.{owner}.com/v1"
        self.url = re.sub("(/chat/completions|/messages)?/*$", "", url.strip(), count=1)
        if self.claude and not re.search("/v[0-9]$", self.url):
            self.url += "/v1"           # ANTHROPIC_BASE_URL is usually given without
        self.key = "".join(env(f"{owner.upper()}_API_KEY", "").split())
        self.official = f"//api.{owner}.com" in self.url
        self.model = model or (DEFAULT[owner] if self.official else "")
        self.answered = self.warned = False

    def http(self, path: str, body: dict | None, parse: Callable) -> object:
        """Send a request, and return what parse() makes of its JSON. Raises Away or Stop."""
        local = re.match(r"https?://(localhost|127\.|\[::1\])", self.url)
        secret = {"x-api-key": self.key} if self.claude else {"Authorization": f"Bearer {self.key}"}
        try:
            answer = requests.request(
                "POST" if body else "GET", self.url + path, json=body,
                headers={"anthropic-version": "2023-06-01"} | (secret if self.key else {}),
                timeout=(10, 1800 if body else 30),     # a slow local model may need half an hour
                allow_redirects=False,          # a redirect might lead the key elsewhere
                auth=lambda request: request,   # else ~/.netrc would replace our header
                proxies=dict.fromkeys(("http", "https", "all")) if local else None)
            code, what = answer.status_code, f"HTTP {answer.status_code}"
            text = answer.content.decode("utf-8-sig", "replace")
            wait = re.match(r"\d{0,9}", answer.headers.get("Retry-After", ""))[0]   # "" for a date
            if answer.is_redirect:
                text = f"redirect to {answer.headers['Location']}"
        except (OSError, ValueError) as error:      # a ValueError: a bad URL, key or proxy
            code, what, wait = 404 if isinstance(error, ValueError) else 503, "no answer", ""
            text = str(error).rpartition("Caused by ")[2]       # the reason stands last
        if code // 100 == 2:
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                return parse(json.loads(text))
            if re.search("^data:", text, re.M):
                code, text = 502, f"a stream, which was not asked for: {text}"
        words = one_line(f"{what} from {self.url}{path}: {text}".replace(self.key or "\0", "KEY"))
        long = code == 413 or code in (200, 400, 422, 500) and LONG.search(one_line(text, 2000))
        temporary = code < 300 or code >= 500 or code in (408, 409, 425, 429, 498)
        if long or temporary or self.answered:      # after a good answer nothing is fatal
            raise Away(words, int(wait or 0), bool(long))
        raise Stop(f"the LLM's server refuses: {words} -> check the API key, --model, --base-url")

    def choose_model(self) -> str:
        """Return the first chat model that the server offers."""
        def first(data: dict | list) -> str:
            items = data if isinstance(data, list) else data.get("data") or data.get("models") or []
            names = [item if isinstance(item, str) else item.get("id") or item.get("name")
                     for item in items]
            chat = [name for name in names if not NO_CHAT.search(name)]
            if 0 < len(chat) <= 20:
                return chat[0]
            some = one_line(str(chat or data), 150)
            raise Stop(f"{self.url} offers {len(chat)} chat models ({some}): choose with --model")
        return self.http("/models", None, first)

    def ask(self, prompt: list[str], turns: list[str], room: int = 0) -> Answer:
        """Send a prompt, its system text first, and the turns since (reply, complaint, ...)."""
        self.model = self.model or self.choose_model()
        texts = [prompt[0], "".join(prompt[1:]), *turns]
        roles = ["system"] + ["user", "assistant"] * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        body = {"model": self.model, "messages": messages}
        if self.claude:
            system, *parts = [{"type": "text", "text": text} for text in prompt if text]
            # It caches up to a mark: all but the last part. An hour, as runs lie between calls.
            mark = {"type": "ephemeral", "ttl": "1h"}
            system["cache_control"] = parts[-2]["cache_control"] = mark
            messages[:2] = [{"role": "user", "content": parts}]
            body |= {"system": [system], "max_tokens": 16_000}
        if room > 0:    # OpenAI knows the new name alone, others the old
            new_name = self.official and not self.claude
            body["max_completion_tokens" if new_name else "max_tokens"] = room
        answer = self.http("/messages" if self.claude else "/chat/completions", body, read_answer)
        self.answered = True
        # A token is 3 to 4 characters. With more than 5, or Ollama's 4096, the prompt was cut.
        cut = answer.input_tokens == 4096 or 1000 < answer.input_tokens < len(str(body)) / 5
        if cut and not self.warned:
            self.warned = True
            say(f"WARNING: {self.url} read only the last {answer.input_tokens} tokens of the "
                f"prompt: start Ollama with OLLAMA_CONTEXT_LENGTH=32768")
        return answer


# ---- 7  Propose: the prompt, the reply, and the search that needs no LLM ------------------------

RULES = """You do machine-learning research: each experiment is a new train.py. A driver trains it
for a fixed time on a fixed machine and keeps it if val_bpb falls: bits per byte of validation text.
- `import prepare` offers DEVICE, SEQ_LEN, VOCAB_SIZE and batches(batch_size, seq_len=SEQ_LEN).
- `train()` returns a torch.nn.Module with model(tokens) -> logits, int64 (B, T) -> float
  (B, T, VOCAB_SIZE), for evaluation at T = SEQ_LEN. Logits at t may depend on tokens[:t+1] of
  their own row alone, and on nothing of earlier calls: probes check it.
- `for x, y, progress in prepare.batches(...)` is the only training data and clock: from the first
  batch until the budget ends the loop; progress is in [0, 1). An epoch has every window once,
  spread over all of the text; another call begins a new one, on the same clock. A step is a batch.
- Before the loop, compiling and warming up are free, for twice the default budget at most. After
  it, 2% of the budget are left, for averaging weights, say. No work may be put off until
  evaluation, which may take the evaluation_limit named below, in wall-clock seconds.
- Imports: torch, numpy, math, harmless standard-library modules. No files, processes, threads,
  getattr, dunder names, seeds; a module's name only before a dot; no program twice, comments aside.
- A change is kept if it is better on two seeds. One that makes the code longer, in lines without
  comments, has to win by a margin on both, named under "Now".

Reply in exactly this form, nothing else:

DESCRIPTION: what changes, in a few words

Two or three sentences: why it should help, and what you expect.

<<<<<<< SEARCH
lines copied exactly from the incumbent train.py
=======
lines to stand in their place
>>>>>>> REPLACE

As many such blocks as needed. Each SEARCH must match the incumbent exactly once: copy enough whole
lines to be unique, and no more. An edit is applied to the incumbent of the moment when it runs,
whose numbers may be others: have `NAME = number` lines in a SEARCH only to change them, and define
new names beside their use. For a rewrite, give the whole new file in one ```python fence.

The person you work for says:
"""


def history(rows: list[dict], experiments: dict[int, Experiment], newest: int) -> Iterator[str]:
    """Yield one text for each experiment, oldest first. test_bpb never is in it."""
    # Old discards and ideas leave it many at a time. In between it only gets longer, so that a
    # provider's cache of the prompt's beginning holds.
    step = max(1, newest // 2)
    first = max(0, (len(rows) - newest) // step * step)
    with_idea = (len(rows) // IDEAS - 1) * IDEAS
    kept = [i for i, row in enumerate(rows) if row["status"] == "keep"]
    for i in sorted({*kept[-newest:], *range(first, len(rows))}):
        row, exp = rows[i], experiments[int(rows[i]["experiment"])]
        run = (exp.runs or [{}])[0]     # a later one would change the text
        speeds = (f"; {run['num_steps']} steps, {speed([run]):.0f} tokens/s"
                  if "num_steps" in run else "")
        why = f"    why: {exp.idea}\n" if i >= with_idea and exp.idea else ""
        yield (f"#{exp.number} {row['status']} {float(row['val_bpb']):.4f} ({row['by']}): "
               f"{row['description']} | {row['reason']}{speeds}\n{why}")


# So many patterns, since LLMs bend the form in so many ways. "\0" stands in the place of a block.
THOUGHT = re.compile(r"""(?imsx)    # "<think> thoughts </think> reply", [THINK], harmony's channels
    \A .* (?: [<\[◁] / [\w:]* (?:think|thought|reason) \w* . | assistant\S{,40}?final(?:<\S+?>)? )
    | (?: ^[<\[◁] [\w:]* (?:think|thought|reason) | analysis<\|message\|> ) .* """)     # no end
START = r"^[ \d.)*`-]*"                         # of a mark's line, in a list, in bold type
LINES = r"\n((?:(?! *[<=>]{5}).*\n)*)"
# "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE": 5 to 9 of each, any name
BLOCK = re.compile(rf"(?m){START}<{{5,9}}.*{LINES}{START}={{5,9}}{LINES}{START}>{{5,9}}")
FENCE = re.compile(r"(?ms)^ *(```+|~~~+)[^\n]*\n(?:train\.py\n)?(.*?)^ *\1$")
UNCLEAR = re.compile(r"""(?imsx) ^[^\w\n]* (<{5}|>{5})    # a block lacks a mark; another proposal:
    | \0.* ^[^\w\n]* (DESCRIPTION|or|option|alternative\w*)\b .*\0""")
SAID = re.compile(r"""(?imx)
    ^[^a-z\n]* DESCRIPTION [*_` ]*      # "DESCRIPTION", "## Description", "1. **DESCRIPTION**"
    (?: [:：>=–—-] (?:[*_`]*\s)? | $)   # ": ", ":** ", " - ", or the end of a heading
    \s* (?!DESCRIPTION) \** ([^\0\n]+?) \** (?:</\w+>)? $   # the text, there or below""")
# "...", "[...]  # as above", "# the rest of the file is unchanged", "pass  # same as before"
ELIDED = re.compile(r"""(?ix) \W* (\.\.\.|…) \W* (\#|$) | \s* (pass\s*)? \#
    ( \s* (\.\.\.|…) | .* ((\.\.\.|…)$ | \b (unchanged | omitted | existing\ code | rest\ of
    | same\ as | the\ same | as\ is | as\ above | as\ before) \b))""")
CODE = re.compile(r"""(?m)("[^"\n]*"|'[^'\n]*'|^ +)|#.*|[ \t]+""")     # [1]: no comment, no blanks
DEFINED = re.compile(r"(?m)^(?:def |class |(?=\w+(?: =|:)))(\w+)")    # at top level


def parse_reply(reply: str) -> tuple[str, str, list[tuple[str, str]], list[str]]:
    """Return (description, why, blocks, whole files), with either blocks or one file."""
    text = THOUGHT.sub("", reply).replace("\xa0", " ")
    text = re.sub(r"(?m)[\ufeff\u200b]|[ \t\r]+$", "", text)
    text = re.sub(r"(?m)^[ \t]+", lambda blanks: blanks[0].expandtabs(4), text)
    text = html.unescape(text) if "&lt;&lt;&lt;" in text else text
    prose, blocks = BLOCK.sub("\0", text), list(dict.fromkeys(BLOCK.findall(text)))
    fences = {textwrap.dedent(fence[2]) for fence in FENCE.finditer(prose)}
    files = [code for code in fences if re.search(r"(?m)^def train\(", code)]   # no snippets
    if UNCLEAR.search(prose) or bool(blocks) + len(files) != 1:
        raise Unusable(f"{len(blocks)} SEARCH blocks and {len(files)} fences with train(): give "
                       "one proposal, as one whole file in a ```python fence or in blocks; a "
                       "block is one line <<<<<<< SEARCH, one =======, one >>>>>>> REPLACE")
    said = SAID.search(prose)       # perhaps in a comment of the file
    why = one_line(re.split("\0|```", SAID.split(prose)[-1])[0], 500)
    name = said[1] if said else re.split(r"(?<=[.!?])\s", why)[0] or "no description"
    return one_line(name, 120), why, blocks, files


def replaced(search: str, replace: str, source: str) -> str:
    """Return the source after one block, whose SEARCH has to fit at one place."""
    search, replace = search.strip("\n"), replace.strip("\n")
    lines, size = source.split("\n"), search.count("\n") + 1
    places = ["\n".join(lines[i:i + size]) for i in range(len(lines))]
    # as it stands (str changes nothing); else shifted as a whole, and without comments and blanks
    for form in str, lambda code: CODE.sub(r"\1", textwrap.dedent(code)):
        found = [i for i, place in enumerate(places) if form(place) == form(search)]
        if found:
            break
    if len(found) != 1 or not form(search).strip():
        near = difflib.get_close_matches(max(search.split("\n"), key=len), lines, 3, 0)
        raise Unusable("\n".join([f"SEARCH fits at {len(found)} places, not at one (the other "
                                  f"blocks may have changed it):", search, "Most like it:", *near]))
    # together, so that they stay shifted against each other
    start, both = found[0], textwrap.dedent(f"{search}\n{replace}".rstrip("\n"))
    shift = re.match(" *", places[start]).end() - re.match(" *", both).end()
    if shift < 0:
        raise Unusable(f"REPLACE is less indented than its SEARCH:\n{replace}")
    lines[start:start + size] = re.sub("(?m)^(?=.)", " " * shift, both).split("\n")[size:]
    return "\n".join(lines)


def apply_reply(reply: str, source: str) -> tuple[str, str]:
    """Return (description, new source) of a reply. Raises Unusable; nothing is ever guessed."""
    description, _, blocks, files = parse_reply(reply)
    new = backwards = files[0] if files else source
    for first, last in zip(blocks, reversed(blocks)):
        new, backwards = replaced(*first, new), replaced(*last, backwards)
    if new != backwards:
        raise Unusable("the order of the blocks makes a difference: make them one")
    for line in filter(ELIDED.match, {*new.split("\n")} - {*source.split("\n")}):
        raise Unusable(f"this line stands for code that is left out, write all of it: {line}")
    for name in {*DEFINED.findall(source)} - {*DEFINED.findall(new)}:
        if re.search(rf"(?<![\w.]){name}\(", new):
            raise Unusable(f"{name}() is called and not defined: a fence holds the whole file")
    try:
        if ast.dump(ast.parse(new)) == ast.dump(ast.parse(source)):
            raise Unusable("it changes nothing, or only comments")
    except (SyntaxError, ValueError) as error:
        raise Unusable(f"with this edit the file does not parse: {error}") from None
    return description, new


def find_knobs(source: str, cuda: bool) -> dict[str, tuple[float, ast.expr]]:
    """Return {NAME: (number, where)} at top level. Of `A if CUDA else B` one side is in force."""
    knobs = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            value = node.value
            if isinstance(value, ast.IfExp) and ast.unparse(value.test) == "CUDA":
                value = value.body if cuda else value.orelse
            with contextlib.suppress(ValueError, TypeError, SyntaxError):   # no number: no knob
                base, _, power = ast.unparse(value).partition(" ** ")
                number = ast.literal_eval(base) ** ast.literal_eval(power or "1")
                if number > 0 and base != "True" and value.lineno == value.end_lineno:
                    knobs[node.targets[0].id] = number, value
    return knobs


def moved(value: float, change: float) -> float:
    """Return a knob's value after a step of `change` in log space."""
    factor = math.exp(max(-1.5, min(1.5, change)))
    if isinstance(value, int):
        if value > 2 and value.bit_count() == 1:    # powers of two stay powers of two
            return value * 2 if change > 0 else value // 2
        return math.ceil(value * factor) if change > 0 else max(1, math.floor(value * factor))
    if 0.5 <= value < 1:        # a momentum, say: what counts is its distance to 1
        return float(f"{max(value / 2, 1 - (1 - value) / factor):.4g}")
    return float(f"{value * factor:.3g}")


def search(rng: random.Random, source: str, cuda: bool) -> Iterator[tuple[str, str]]:
    """Yield (description, changed source) again and again: one to three knobs, moved."""
    knobs = find_knobs(source, cuda)
    for attempt in range(200 if knobs else 0):
        lines, moves = source.split("\n"), []
        how_many = rng.choice((1, 1, 1, 2, 2, 3))       # mostly one, so that a result teaches
        for name in rng.sample(sorted(knobs), min(len(knobs), how_many)):
            old, at = knobs[name]
            # Steps widen with the attempts: what is near has been seen.
            new = moved(old, rng.choice((-1, 1)) * rng.uniform(0.2, 0.8) * 1.03 ** attempt)
            if new != old:
                line = lines[at.lineno - 1]
                lines[at.lineno - 1] = f"{line[:at.col_offset]}{new!r}{line[at.end_col_offset:]}"
                moves.append(f"{name} {old!r} -> {new!r}")
        yield ", ".join(moves), "\n".join(lines)


# ---- 8  Show: the live line, the verdict, the summary, progress.svg -----------------------------

VERDICT = "#{experiment:<4} {by:8} {val_bpb}  {status:7}  {description}  [{reason}]"
# for the colour-blind too, on white and on black
COLOURS = {"llm": "#1f87d6", "search": "#d55e00", "human": "#009e73"}
WIDTH, HEIGHT = 540, 220    # of the plot; its corner is (0, 0)
HEAD = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-80 -90 640 450"><style>'
        "svg{font:17px sans-serif;fill:#1f2328;background:#fff}"     # 9.5 pixels on a phone
        "@media(prefers-color-scheme:dark){svg{fill:#e6edf3;background:#0d1117}}</style>")
TEXT = '<text x="{}" y="{}">{}</text>'


def say(line: str, end: str = "\n"):
    """Print a line in the place of the live one, at once: other threads print as well."""
    print("\r\033[K" * sys.stdout.isatty() + line + end, end="", flush=True)


def show(line: str):
    """Redraw the live line, in a terminal."""
    if sys.stdout.isatty():
        say(line[:shutil.get_terminal_size().columns - 1], end="")


def headline(kept: list[dict], noise: float, confirmed: dict) -> tuple[str, str]:
    """Return baseline and best, and the gain with its error, in words."""
    if len(kept) < 2:
        return "no gain yet", "nothing better than the baseline was kept"
    a, b = scores_of(kept[0]), scores_of(kept[-1])
    old, new = fmean(a), fmean(b)
    gain, error, how = old - new, standard_error(len(a), len(b), noise), "as selected"
    # an earlier incumbent's gain does not count
    if "gain" in confirmed and str(confirmed["incumbent"]) == kept[-1]["experiment"]:
        gain, error = confirmed["gain"], confirmed["error"]
        how = f"confirmed on {confirmed['n']} fresh seeds"
    return f"baseline {old:.4f} → best {new:.4f}", f"gain {gain:.3f} ± {error:.3f}, {how}"


def summary(rows: list[dict], confirmed: dict, experiments: Iterable[Experiment]) -> str:
    """Return the night in lines: gain, kept changes, counts, time, tokens."""
    if not rows:
        return "Nothing is measured yet: python autoresearch.py starts with the baseline."
    kept = [row for row in rows if row["status"] == "keep"]
    lines = [": ".join(headline(kept, noise_of(rows), confirmed))]
    lines += [f"{VERDICT.format(**row)} test_bpb {row['test_bpb']}" for row in kept]
    status = collections.Counter(row["status"] for row in rows[1:])     # without the baseline
    train, total, sent, got = (sum(float(row[name] or 0) for row in rows) for name in (
        "train_seconds", "total_seconds", "input_tokens", "output_tokens"))
    lines.append(f"{len(rows) - 1} experiments: {status['keep']} kept, "
                 f"{status['discard']} discarded, {status['crash']} crashed; "
                 f"{train / (total or 1):.0%} of the time was training")
    if asked := [exp for exp in experiments if exp.calls]:
        calls = sum(exp.calls for exp in asked)
        cached = sum(exp.cached_tokens for exp in asked)
        useful = sum(bool(exp.runs) for exp in asked)
        lines.append(f"LLM: {sent:.0f} tokens in ({cached} cached), {got:.0f} out, {calls} calls, "
                     f"{calls - useful} led to nothing")
    if lines[0].endswith("as selected"):
        lines.append("To measure the gain on fresh seeds: python autoresearch.py --confirm 5")
    return "\n".join(lines)


def progress_svg(rows: list[dict], confirmed: dict) -> str:
    """Return the ledger as a picture: dots and the incumbent's staircase."""
    kept, noise = [i for i, row in enumerate(rows) if row["status"] == "keep"], noise_of(rows)
    val = [float(row["val_bpb"] or 0) for row in rows]      # 0 for a crash
    steps = [val[i] for i in kept] or [1.0]
    # noise alone never fills the plot
    span = 1.5 * max(max(steps) - min(steps), 10 * noise, 0.01)
    high, scale = max(steps) + span / 6, HEIGHT / span
    x = [WIDTH * i // max(len(rows), 1) for i in range(len(rows) + 1)]
    # what is far off is at an edge
    y = [round(min(max((high - bpb) * scale, 0), HEIGHT)) for bpb in val]

    title, gain = headline([rows[i] for i in kept], noise, confirmed)
    svg = [HEAD, TEXT.format(-65, -58, title), TEXT.format(-65, -30, gain),
           TEXT.format(-65, HEIGHT + 35, "val_bpb, lower is better; × crashed, ▲ far above")]
    for at in range(0, HEIGHT + 1, HEIGHT // 4):
        svg.append(TEXT.format(-65, at + 5, f"{high - at / scale:.3f}"))
    for i, end in itertools.pairwise([*kept, len(rows)]):
        # as thick as the score is uncertain
        band = max(2, 2 * noise * scale / math.sqrt(len(scores_of(rows[i]))))
        svg.append(f'<path d="M{x[i]} {y[i]}H{x[end]}" stroke="#8888" stroke-width="{band:.0f}"/>')
    for k, by in enumerate(dict.fromkeys(row["by"] for row in rows)):
        mine = [i for i, row in enumerate(rows) if row["by"] == by]
        words = f"● {html.escape(one_line(by))}: {len({*mine} & {*kept})} of {len(mine)} kept"
        svg.append(f'<g fill="{COLOURS.get(by, "gray")}">')
        svg.append(TEXT.format(-65, HEIGHT + 60 + 22 * k, words))
        for i in mine:
            if rows[i]["status"] == "crash" or val[i] > high:
                svg.append(TEXT.format(x[i] - 6, y[i] + 6, "▲" if val[i] else "×"))
            else:
                svg.append(f'<circle cx="{x[i]}" cy="{y[i]}" r="{7 if i in kept else 4}"/>')
        svg.append("</g>")
    return "\n".join([*svg, "</svg>"])


# ---- 9  The loop --------------------------------------------------------------------------------

# 1. The ledger, the experiments, what is active and train.py change under one lock.
# 2. Nobody waits for an accelerator, an answer or a run while holding it. An accelerator is held
#    only inside `with self.accelerator(...)`; the LLM is asked only outside.
# 3. Judging and recording are one hold of the lock, else two keeps overtake each other.
# 4. Order of a keep: save a person's edit, write train.py, commit, row, then memory. Before the
#    row a kill means judging again from experiment.json, without a run and without a paid reply.

class Lab:
    """What the threads share: the ledger, the experiments, the accelerators.

    With an LLM each accelerator has three threads: one drafts while another's run trains, and the
    third lets the search fill in. Without an LLM it has one. Any of them takes a person's edit.
    """

    def __init__(self, args: argparse.Namespace, llm: LLM | None):
        self.args, self.llm = args, llm             # None as well once --tokens are used
        self.lock = threading.Condition()           # wait() lets go of it meanwhile
        self.stop = threading.Event()               # it was interrupted, or there is enough
        self.rows = read_ledger(repair=True)
        self.experiments: dict[int, Experiment] = {}    # by number, also those without a row
        self.active: list[Experiment] = []          # what the threads are at
        self.conditions = read_json(CONDITIONS)
        self.left = math.inf                        # experiments still to be recorded
        self.discards = 0                           # in a row, since the incumbent last ran
        self.false_starts = 0                       # runs in a row that did not start
        self.free = dict.fromkeys(range(args.workers), time.monotonic())    # gpu -> since when
        self.live: dict[int, str] = {}              # accelerator -> how far its run is
        self.program = ""                           # the last program.md that could be read
        self.history = HISTORY                      # halved when a prompt was too long
        self.tokens = 0                             # in and out, in this start
        self.away = False                           # does the LLM give no answer?
        self.pause = 0                              # seconds before a request, after some in vain

    @property
    def incumbent(self) -> Experiment:
        kept = [row["experiment"] for row in self.rows if row["status"] == "keep"]
        return self.experiments[int(kept[-1]) if kept else 0]

    @property
    def waiting(self) -> list[Experiment]:      # left by a kill, sent back, or a person's
        recorded = {int(row["experiment"]) for row in self.rows}
        return [exp for exp in self.experiments.values()
                if exp.number not in recorded and exp not in self.active]

    def research(self, by: str):
        """Propose, run, judge, record, until there have been as many experiments as asked for."""
        while exp := self.take(by):                     # an experiment that waits, or a new one
            try:
                self.propose(exp)                       # seconds to minutes, if an LLM does it
                with self.accelerator(exp) as gpu:      # the first that is free
                    self.build(exp)                     # the change, applied to the incumbent
                    while not self.judged(exp):         # judge and record it; else it has to run
                        self.run(exp, gpu)
            except Unusable as problem:                 # a reply that does not fit, or a crash
                self.send_back(exp, *problem.args)

    def take(self, by: str) -> Experiment | None:
        """Return what to go on with: what waits, or a new one; None: enough is in progress."""
        with self.lock:
            if self.left <= 0:
                self.stop.set()
            self.save_edit()
            # A person's too. Without an LLM, search runs the drafts that one left.
            mine = [exp for exp in self.waiting
                    if exp.by in (by, "human") or exp.source and not self.llm]
            mine.sort(key=lambda exp: exp.by != "human")        # a person's goes first
            enough = [other.by for other in self.active].count(by) >= self.left
            if enough and not (mine and mine[0].by == "human"):
                return None
            exp = mine[0] if mine else self.new_experiment(by)
            self.active.append(exp)
            return exp

    def may_start_at(self, exp: Experiment) -> float:
        """Return from which time.monotonic() on exp may have one; inf: not as things are now."""
        idle_since = min(self.free.values(), default=math.inf)
        if self.args.workers - len(self.free) >= self.left:
            return math.inf         # what runs already may be enough
        if exp.by == "human" or exp not in self.active:
            return idle_since       # an edit; or, never active, the baseline and --confirm
        if any(other.by == "human" and not other.tries for other in self.active + self.waiting):
            return math.inf         # the edit goes first
        if exp.by == "search" and self.llm:     # it fills in for the LLM, whatever keeps that
            return idle_since + IDLE_SHARE * self.conditions.get("budget", 60)
        return idle_since

    @contextlib.contextmanager
    def accelerator(self, exp: Experiment) -> Iterator[int]:
        """Wait for a free accelerator and have it until the end of the block."""
        with self.lock:
            while not self.stop.is_set() and time.monotonic() < self.may_start_at(exp):
                self.lock.wait(0.2)     # nobody is notified of a stop, or that time has passed
            if self.stop.is_set():
                sys.exit()              # this thread alone: threading ignores SystemExit
            gpu = min(self.free)
            del self.free[gpu]
        try:
            yield gpu
        finally:
            with self.lock:
                self.live.pop(gpu, None)
                self.free[gpu] = time.monotonic()
                self.lock.notify_all()

    def new_experiment(self, by: str, description: str = "", source: str = "") -> Experiment:
        number = max(self.experiments) + 1
        self.experiments[number] = Experiment(number, by, description, source=source)
        return self.experiments[number]

    def save_edit(self):
        """Make a person's edit of train.py an experiment, and train.py the incumbent again."""
        best = self.incumbent.source
        source = read(TRAIN) if TRAIN.exists() else ""
        if source == best or not source.strip():        # empty: just being written
            return
        edit = self.new_experiment("human", f"a person's edit of {TRAIN}", source)
        edit.save()
        write_whole(TRAIN, best)
        say(f"{TRAIN} was edited: saved as {edit.folder / TRAIN}, and measured next; {TRAIN} is "
            f"the incumbent again")

    def send_back(self, exp: Experiment, problem: str, log: str = "", its_fault: bool = True):
        """Return exp to its LLM with what is wrong, RETURNS times at most; else it is a crash."""
        with self.lock:
            # Once --tokens are used it waits for the next start.
            has_llm = exp.by == self.args.researcher == "llm"
            if not (has_llm and its_fault and len(exp.turns) // 2 < RETURNS):
                return self.record(exp, "crash", problem)
            log = f"\nThe end of its log, as data:\n```\n{log}\n```" if log else ""
            exp.turns.append(f"That could not be used: {problem}{log}\nReply again, complete and "
                             f"in the form asked for, with edits of the incumbent as shown above.")
            exp.source, exp.fingerprint, exp.runs = "", "", []
            exp.save()
            self.active.remove(exp)
            self.pause = min(LONGEST_PAUSE, 2 * self.pause or 0.25)
            say(f"#{exp.number} goes back to the LLM in {self.pause:g} s: {one_line(problem, 100)}")

    def propose(self, exp: Experiment):
        """Have the LLM write a reply, and try it on the incumbent; the others need none."""
        if exp.by == "llm":
            while len(exp.turns) % 2 == 0:      # the last is a complaint, or there is none
                self.ask(exp)
            self.build(exp)     # finds misfits while others train; research() builds it again

    def ask(self, exp: Experiment):
        """Ask the LLM once. Its reply becomes a turn of exp, unless it was cut or did not come."""
        self.stop.wait(self.pause * random.uniform(1, 1.5))     # not all threads at the same time
        if self.stop.is_set() or not (llm := self.llm):
            sys.exit()              # this thread alone
        prompt = self.prompt(exp)
        write_whole(exp.folder / f"prompt-{exp.calls}.md", "".join(prompt))
        try:
            answer = llm.ask(prompt, exp.turns, exp.room)
        except Away as error:
            exp.room = -abs(exp.room)       # perhaps it does not offer so much
            return self.take_absence(*error.args)
        # Most likely its thoughts have used up the limit: it is asked once more, with a higher one.
        again = answer.finish in ("length", "max_tokens") and not exp.room
        with self.lock:             # saved at once, since it was paid for
            write_whole(exp.folder / f"reply-{exp.calls}.md", answer.text)
            write_whole(exp.folder / f"response-{exp.calls}.json", answer.raw)
            exp.turns += [] if again else [answer.text.strip() or "(nothing)"]
            exp.model, exp.calls = llm.model, exp.calls + 1
            exp.room = MORE_ROOM if again else 0
            exp.input_tokens += answer.input_tokens
            exp.cached_tokens += answer.cached_tokens
            exp.output_tokens += answer.output_tokens
            exp.save()
            self.tokens += answer.input_tokens + answer.output_tokens
            if self.away:
                say("LLM: it answers again")
                self.away, self.pause = False, 0
            if self.tokens >= (self.args.tokens or math.inf):
                say(f"LLM: {self.tokens} tokens are used (--tokens); search goes on alone")
                self.llm = None
        if not (answer.whole or again):
            raise Unusable(f"the reply is not whole (finish reason {answer.finish}): be brief")

    def take_absence(self, why: str, wait: float, too_long: bool):
        """Halve a history that was too long; else say once that the LLM is away, and wait."""
        with self.lock:
            if too_long and self.history > 1:
                self.history //= 2
                return say(f"LLM: {why}; of the history it gets {self.history} experiments now")
            if not self.away:
                say(f"LLM: {why}; it is asked again at times, and search fills in")
            self.away, self.pause = True, min(LONGEST_PAUSE, max(wait, 2 * self.pause or 0.25))

    def prompt(self, exp: Experiment) -> list[str]:
        """Return the prompt in parts, what changes least first: providers cache its beginning."""
        with self.lock:
            with contextlib.suppress(OSError):      # an editor may just be replacing it
                self.program = PROGRAM.read_text("utf-8", "replace") or self.program
            if not self.program:
                raise Stop(f"{PROGRAM} cannot be read: write one, or git checkout {PROGRAM}")
            best, last, noise = self.incumbent, self.incumbent.runs[-1], noise_of(self.rows)
            facts = [f"{name}: {fact}\n" for name, fact in self.conditions.items()
                     if name not in ("sha256", "prepare", "folder", "threads", "name")]
            begin = (f"# The machine\n{''.join(facts)}\n"
                     f"# The incumbent: experiment {best.number}\n"
                     f"```python\n{best.source.rstrip()}\n```\n\n"
                     f"# History, oldest first: number, verdict, val_bpb (0 for a crash), who: "
                     f"what | gain over the incumbent of then; steps, tokens/s\n")
            scores = ", ".join(f"{score:.4f}" for score in best.scores)
            share = last.get("num_tokens", 0) / self.conditions.get("train_tokens", math.nan)
            margin = WIN * standard_error(1, len(best.scores), noise)
            now = (f"\n# Now\nThe incumbent has {fmean(best.scores):.4f}, of runs with {scores}; "
                   f"the newest took {last.get('num_steps', '?')} steps, {speed([last]):.0f} "
                   f"tokens/s, {share:.2g} times the train_tokens. Noise between seeds: "
                   f"{noise:.4f}. More code has to win by {margin:.4f}.\n")
            if best.drift:
                now += f"Since it was scored {best.drift}: what lost to it need not be worse.\n"
            for other in self.active:       # a search's has no description until it runs
                if other is not exp and (other.description or other.by == "llm"):
                    what = other.description or "being written from this same text: go another way"
                    now += f"In progress: #{other.number}: {what}\n"
            past = history(self.rows, self.experiments, self.history)
            return [RULES + self.program, begin, *past, now + "Propose the next experiment."]

    def build(self, exp: Experiment):
        """Make exp a change of the present incumbent, unless it is or has run. Raises Unusable."""
        with self.lock:
            best = self.incumbent
            if exp.runs or exp.fingerprint and exp.base == best.number:
                return
            candidates = [(exp.description, exp.source)]    # a person's fits any incumbent
            if exp.by == "search":
                rng = random.Random(f"{exp.number} {best.fingerprint}")
                cuda = self.conditions.get("device") not in ("cpu", "mps")
                candidates = search(rng, best.source, cuda)
            if exp.by == "llm":
                candidates = [apply_reply(exp.turns[-1], best.source)]
                exp.idea = parse_reply(exp.turns[-1])[1]
                if exp.source == candidates[0][1]:      # it would undo what was kept since
                    raise Unusable("a whole file, but the incumbent has changed since you wrote it")
            others = {other.fingerprint: other.number for other in self.experiments.values()
                      if other is not exp}
            for description, source in candidates:
                fingerprint = screen(source)
                if fingerprint not in others:
                    exp.description, exp.source = description, source
                    exp.fingerprint, exp.base = fingerprint, best.number
                    return exp.save()
            if exp.by != "search":
                raise Unusable(f"the same program as #{others[fingerprint]}, comments aside")
            if not self.llm:
                raise Stop("search has nothing new to propose: edit train.py, or connect an LLM")
            self.active.remove(exp)
            sys.exit()              # this thread alone

    def run(self, exp: Experiment, gpu: int):
        """Train exp once more, and before it the incumbent, if that is due."""
        with self.lock:
            best, due = self.incumbent, self.discards >= RECHECK
            self.discards = 0 if due else self.discards
        if due:     # a score from a lucky seed or a fast hour must not block the night
            say(f"#{best.number} runs once more: {RECHECK} discards in a row lost to it")
            try:
                self.measure(best, gpu, best.runs)
            except Unusable as problem:
                say(f"#{best.number} did not run again: {problem.args[0]}")
        self.measure(exp, gpu, exp.runs)
        if exp.by == "llm":
            self.pause = 0

    def measure(self, exp: Experiment, gpu: int, reports: list[dict]):
        """Train exp on a seed of its own and append the report to `reports`. Raises Unusable."""
        with self.lock:
            k, exp.tries = exp.tries, exp.tries + 1
            exp.save()          # counted before it begins: it may be what kills the driver
        log, seed = exp.folder / f"run-{k}.log", 1000 * exp.number + k + 1
        command = [*self.args.launch, sys.executable, "prepare.py", "--folder", self.args.folder,
                   "--run", str(exp.folder / "train.py"), "--seed", str(seed)]
        if budget := self.args.budget or self.conditions.get("budget"):
            command += ["--budget", str(budget)]

        def on_event(event: dict, printed: str):
            what = event["event"]
            if what == "setup":
                self.check_conditions(event)
            if what == "progress":
                what = f"{event['share']:.0%} {event['tokens_per_second']:.0f} tokens/s {printed}"
            self.live[gpu] = f"#{exp.number} {exp.by} run {k + 1} {what}"

        on_event({"event": "starting"}, "")
        try:
            patience = math.inf if self.args.launch else START_LIMIT    # a queue may be long
            report = run_command(command, log, run_environment(**self.args.env[gpu]), patience,
                                 self.stop, on_event)
            if not report["reason"]:
                reports.append(report)
        finally:                # tries > ended then means that the driver died
            with self.lock:
                exp.ended += 1
                exp.save()
        reason, started = report["reason"], report["started"]
        if reason and self.stop.is_set():
            sys.exit()          # this thread alone
        self.false_starts = 0 if started else self.false_starts + 1
        if self.false_starts >= FALSE_STARTS:
            raise Stop(f"{FALSE_STARTS} runs in a row did not even start: {reason}")
        if reason:
            raise Unusable(reason, report["log"], started)

    def judged(self, exp: Experiment) -> bool:
        """Judge exp by its runs so far, and record it; False if it has to run, or run again."""
        with self.lock:
            if not exp.scores:
                return False
            best, noise = self.incumbent, noise_of(self.rows)
            longer = code_lines(exp.source) > code_lines(best.source)
            verdict = judge(exp.scores, best.scores, noise, longer)
            gain = fmean(best.scores) - fmean(exp.scores)
            reason = f"{gain:+.4f} ({gain / max(noise, 1e-9):+.1f} noise) against #{best.number}"
            if verdict == "again":          # once more, on a fresh seed
                say(f"#{exp.number} {exp.by} {exp.scores[-1]:.4f} looks better, {reason}")
            else:
                self.record(exp, verdict, reason)
            return verdict != "again"

    def record(self, exp: Experiment, status: str, reason: str):
        """Make a verdict last. Whoever calls it has the lock, or no other thread is at work."""
        if self.left <= 0:
            sys.exit()              # this thread alone: it is judged at the next start
        self.save_edit()
        commit = ""
        if status == "keep" and exp.number:
            write_whole(TRAIN, exp.source)
            commit = git_commit(exp.description, reason)
        row = ledger_row(exp, status, reason, commit)
        append_row(row)         # the last: before it, a kill means judging again
        self.rows.append(row)
        self.left -= 1
        self.discards = 0 if status == "keep" else self.discards + (status == "discard")
        if status != "keep":    # it stands in its folder; a night has a thousand of them
            exp.source, exp.turns = "", []
        self.active = [other for other in self.active if other is not exp]
        write_whole(PLOT, progress_svg(self.rows, read_json(CONFIRMED)))
        say(VERDICT.format(**row))

    def check_conditions(self, event: dict):
        """Refuse a run whose score could not be compared with the baseline's."""
        with self.lock:
            if not self.conditions:
                self.conditions = {name: event[name] for name in event.keys() - {"event", "limit"}}
                self.conditions["folder"] = str(self.args.folder)
                write_whole(CONDITIONS, self.conditions)
        for name in COMPARED:
            new = event.get(name)
            if (old := self.conditions.get(name, new)) != new:      # older files lack some names
                raise Stop(f"{LEDGER} was measured with {name} {old} and this start has {new}: "
                           f"start it as before, or move {LEDGER} and {FOLDER}/ away")

    def recover(self):
        """Go on where the last start ended, and leave train.py as the incumbent."""
        for row in self.rows:       # the ledger alone is enough to go on
            runs = [{"val_bpb": score} for score in scores_of(row)]
            exp = Experiment(int(row["experiment"]), row["by"], runs=runs, tries=len(runs))
            self.experiments[exp.number] = exp
        self.experiments |= {exp.number: exp for exp in saved_experiments()}
        if not self.rows:
            return
        best = self.incumbent
        best.source = best.source or read(TRAIN)
        best.fingerprint = best.fingerprint or screen(best.source)
        # A kill between the two writes of a keep has left a candidate in train.py. It waits, and
        # is judged again; anything else that is no incumbent there is a person's edit.
        if not TRAIN.exists() or read(TRAIN) in [exp.source for exp in self.waiting]:
            write_whole(TRAIN, best.source)
        for exp in self.waiting:
            if exp.tries - exp.ended >= DEATHS:
                self.record(exp, "crash", f"the driver or the machine died {DEATHS} times under it")

    def measure_baseline(self):
        """Make train.py as found the first incumbent, by BASELINE_RUNS runs."""
        source, base = read(TRAIN), self.experiments.get(0)
        if not base or base.source != source:       # else a kill has left some of its runs
            base = Experiment(0, "baseline", "baseline", source=source, fingerprint=screen(source))
        self.experiments[0] = base
        say(f"baseline    {TRAIN} as it is, {BASELINE_RUNS} runs")
        todo = [(base, base.runs)] * (BASELINE_RUNS - len(base.runs))
        self.in_threads(self.measure_next, todo, self.args.workers)
        self.record(base, "keep", "the baseline")

    def confirm(self, n: int):
        """Run baseline and incumbent n times each, on seeds that decided nothing."""
        if not self.rows or not self.incumbent.number:
            raise Stop("nothing was kept yet, there is no gain to confirm: leave out --confirm")
        base, best = self.experiments[0], self.incumbent
        if not base.source:
            raise Stop(f"{base.folder} is missing, so the baseline cannot be run again")
        fresh = {exp: exp.fresh.setdefault(str(best.number), []) for exp in (base, best)}
        # In turns, so that a machine that slows down slows both; without what a kill has left.
        todo = [(exp, runs) for i in range(n) for exp, runs in fresh.items() if i >= len(runs)]
        self.in_threads(self.measure_next, todo, self.args.workers)
        a, b = fresh.values()
        n = min(len(a), len(b))         # more than asked for, if there were more
        state = {"incumbent": best.number, "n": n, "baseline_runs": a, "incumbent_runs": b}
        for name, prefix in ("val_bpb", ""), ("test_bpb", "test_"):
            before, after = ([run[name] for run in runs] for runs in (a, b))
            noise = pooled_noise([before, after]) or noise_of(self.rows)    # one each shows none
            gain = fmean(before) - fmean(after)
            error = standard_error(len(before), len(after), noise)
            state |= {f"{prefix}gain": gain, f"{prefix}error": error}
            say(f"{name}: gain {gain:.4f} ± {error:.4f} (standard error), {n} fresh seeds")
        write_whole(CONFIRMED, state)
        write_whole(PLOT, progress_svg(self.rows, state))

    def measure_next(self, todo: tuple[Experiment, list]):
        exp, reports = todo
        try:
            with self.accelerator(exp) as gpu:
                self.measure(exp, gpu, reports)
        except Unusable as problem:
            raise Stop(f"#{exp.number} does not run: {problem.args[0]}; see {exp.folder}/"
                       f"run-*.log and mend {TRAIN}") from None

    def in_threads(self, work: Callable, todo: list, n: int):
        """Have n threads do the work and show how far they are; the first failure ends it."""
        remaining, failures = iter(todo), []

        def worker():
            try:
                for item in remaining:      # each thread takes the next one
                    work(item)
            except Exception as error:      # sys.exit() is no failure
                failures.append(error)

        threads = [threading.Thread(target=worker, daemon=True) for _ in range(n)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            # One that still waits for an answer is not needed once there are enough experiments.
            if self.stop.is_set() and len(self.free) == self.args.workers:
                break
            words = [*self.live.copy().values(), self.incumbent.drift]
            show(" | ".join(filter(None, words)) or "waiting for the LLM")
            time.sleep(0.1)
        if failures:
            raise failures[0]

    def night(self):
        """Research until there is enough of it, something fails, or somebody stops it."""
        workers = self.args.workers
        try:
            if self.args.confirm:
                return self.confirm(self.args.confirm)
            if not self.rows:
                self.measure_baseline()
            self.left = self.args.experiments or math.inf
            researchers = workers * (["llm", "llm", "search"] if self.llm else ["search"])
            self.in_threads(self.research, researchers, len(researchers))
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self.stop.set()
            self.lock.acquire()     # and never let go: nothing is written after the summary
            self.lock.wait_for(lambda: len(self.free) == workers, GRACE + 5)
            say(summary(self.rows, read_json(CONFIRMED), self.experiments.values()))
            if self.rows and self.incumbent.drift:
                say(self.incumbent.drift)


def ledger_row(exp: Experiment, status: str, reason: str, commit: str) -> dict[str, str]:
    """Return the row of results.tsv. Without a commit it names the program by its fingerprint."""
    runs = exp.runs if status != "crash" else [collections.Counter()]       # 0 of everything
    return {
        "commit": commit or exp.fingerprint[:7] or "0000000",
        "val_bpb": f"{fmean(run['val_bpb'] for run in runs):.6f}",
        "memory_gb": f"{max(run['peak_memory_mb'] for run in runs) / 1000:.1f}",
        "status": status,
        "description": one_line(exp.description) or "no proposal that could be run",
        "experiment": str(exp.number),
        "by": exp.by,
        "runs": ",".join(f"{run['val_bpb']:.6f}" for run in exp.runs),
        "test_bpb": f"{fmean(run['test_bpb'] for run in runs):.6f}",
        "reason": one_line(reason),
        "train_seconds": f"{sum(run['train_seconds'] for run in runs):.1f}",
        "total_seconds": f"{sum(run['total_seconds'] for run in runs):.1f}",
        "input_tokens": str(exp.input_tokens),
        "output_tokens": str(exp.output_tokens),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}


def git_commit(description: str, reason: str) -> str:
    """Commit train.py alone, on a branch autoresearch/... only. Returns the hash, or ""."""
    def git(*args: str | Path) -> str:
        # A person's hooks and signatures may ask questions, and nobody is there at night.
        quiet = "git", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false"
        return subprocess.run([*quiet, *args], capture_output=True, text=True, check=True,
                              timeout=60, stdin=subprocess.DEVNULL).stdout.strip()
    try:
        if git("rev-parse", "--abbrev-ref", "HEAD").startswith("autoresearch/"):
            if git("status", "--porcelain", TRAIN):     # else a kill came after the commit
                git("add", TRAIN)
                git("commit", "--only", "-m", f"{description}\n\n{reason}", TRAIN)
            return git("rev-parse", "--short=7", "HEAD")
    except (subprocess.SubprocessError, OSError) as error:
        if "not a git repository" not in (words := getattr(error, "stderr", "") or str(error)):
            say(f"{TRAIN} was not committed, and the night goes on: {one_line(words)}")
    return ""


# ---- 10  Start ----------------------------------------------------------------------------------

def ask_prepare(*flags: str) -> str:
    """Run prepare.py, which has torch and the data; show what it prints, return the last line."""
    process = subprocess.Popen([sys.executable, "prepare.py", *flags], stdout=subprocess.PIPE,
                               text=True, env=run_environment())
    for line in process.stdout:
        say(line.rstrip())
    if process.wait():      # else there was a line
        raise Stop("prepare.py did not get ready, see above")
    return line.strip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--experiments", type=int, metavar="N", help="stop after N (default: go on; 0: summary)")
    add("--budget", type=float, metavar="SECONDS", help="training time of a run")
    add("--researcher", choices=("llm", "search"), help="default: llm if one is configured")
    add("--model", help="the LLM's name")
    add("--base-url", metavar="URL", help="of an OpenAI-compatible or Anthropic endpoint")
    add("--tokens", type=int, metavar="N", help="ask the LLM no more once N are used, in and out")
    add("--workers", type=int, default=1, metavar="N", help="experiments at a time (1)")
    add("--launch", type=shlex.split, default=[], metavar="PREFIX", help="before a run's command")
    add("--data", metavar="NAME|PATH", help="stdlib, tinystories, c4[:SHARDS], a file or folder")
    add("--confirm", type=int, metavar="N", help="run baseline and incumbent N times each")
    parser.error = lambda message: parser.exit(
        2, f"autoresearch.py: {message}; --help shows the flags\n")
    args = parser.parse_args()
    least = {"experiments": 0, "budget": 0.1, "tokens": 1, "workers": 1, "confirm": 1}
    for flag, value in vars(args).items():
        if flag in least and value is not None and not least[flag] <= value < math.inf:
            parser.error(f"--{flag} has to be at least {least[flag]}")
    configured = args.base_url or any(map(os.environ.get, (
        "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY")))
    args.researcher = args.researcher or ("llm" if configured else "search")
    if args.researcher == "llm" and not configured:
        parser.error("--researcher llm needs ANTHROPIC_API_KEY, OPENAI_API_KEY or --base-url")
    if args.launch and not shutil.which(args.launch[0]):
        parser.error(f"--launch: there is no program {args.launch[0]} on this machine")
    if args.data and Path(args.data).exists():      # it may be relative to where we were started
        args.data = str(Path(args.data).resolve())
    return args


def lock_folder(file: int):
    """Refuse a second driver in this folder."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop("another driver works in this folder: stop it, or use a copy") from None
    except OSError:
        say("WARNING: this file system has no locks: start no second driver in this folder")


def start(args: argparse.Namespace):
    """Take the folder's lock, go on where its ledger ends, and research."""
    FOLDER.mkdir(exist_ok=True)
    lock_folder(os.open(FOLDER / "lock", os.O_WRONLY | os.O_CREAT))     # open until we end
    asking = args.researcher == "llm" and not args.confirm
    lab = Lab(args, LLM(args.base_url, args.model) if asking else None)
    lab.recover()
    if args.budget and lab.conditions:      # only a run knows the other conditions
        lab.check_conditions(lab.conditions | {"budget": args.budget})
    args.folder = Path(lab.conditions.get("folder", "none"))
    if args.data or not (args.folder / "meta.json").exists():
        args.folder = Path(ask_prepare("--data", args.data or ""))
    args.env = [{}] * args.workers          # of the runs on each accelerator
    if args.workers > 1 and not args.launch:
        cores = str(os.cpu_count() // args.workers or 1)
        gpus = ask_prepare("--devices").split(",") * args.workers       # [""] without CUDA
        args.env = [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": cores} for gpu in gpus]
    if asking:
        with contextlib.suppress(Away):     # then it is chosen as soon as the server is there
            if lab.llm.official:            # a wrong key is named before the baseline runs
                lab.llm.http("/models", None, dict)
            lab.llm.model = lab.llm.model or lab.llm.choose_model()
        say(f"researcher  {lab.llm.model or 'an LLM'} at {lab.llm.url}")
    elif not args.confirm:
        say("researcher  search; for an LLM set ANTHROPIC_API_KEY, OPENAI_API_KEY or --base-url")
    say(f"data        {args.folder.name}\nresults     {len(lab.rows)} rows in {LEDGER}, {PLOT}")
    say("to stop     Ctrl-C; the same command goes on where it was")
    lab.night()


def main() -> int | str:
    """Return 0, or what went wrong: sys.exit() prints that and ends with code 1."""
    for sign in SIGNALS:        # they end the main thread, which waits while others write
        if signal.getsignal(sign) != signal.SIG_IGN:        # nohup wants to outlive its terminal
            signal.signal(sign, lambda number, frame: sys.exit(128 + number))
    sys.stdout.reconfigure(errors="replace")    # an LLM's words may not fit the terminal's code
    try:
        args = parse_arguments()
        os.chdir(Path(__file__).resolve().parent)
        if args.experiments == 0:
            print(summary(read_ledger(repair=False), read_json(CONFIRMED), saved_experiments()))
        else:
            start(args)
        return 0
    except Stop as stop:
        return f"autoresearch.py: {stop}"
    except Unusable as problem:     # of the baseline or the incumbent
        return f"autoresearch.py: {TRAIN}: {problem.args[0]}: mend it, or git checkout {TRAIN}"
    except OSError as error:
        return (f"autoresearch.py: {error.strerror or error}: {error.filename or Path.cwd()}; what "
                f"was logged is safe: make room, give permission or put it there, and start again")


if __name__ == "__main__":
    sys.exit(main())
