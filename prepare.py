"""The fixed part: it prepares the text, runs a train.py on the clock, and computes its score.

    python prepare.py                     # the text used last; at first c4, without CUDA python
    python prepare.py --data python       # the code of Python, torch and numpy; no network
    python prepare.py --data stdlib       # that of Python alone
    python prepare.py --data tinystories  # children's stories, 2.2 GB
    python prepare.py --data c4:8         # eight files (shards) of web text, 0.8 GB each
    python prepare.py --data my/texts     # a file or a folder of UTF-8 text of your own
    python prepare.py --run train.py      # train this candidate once and print its score

Nobody edits this file during research. A driver, such as autoresearch.py, starts it for each run
of a candidate, which an LLM wrote and which runs with your rights: see README.md.
"""

import argparse
import ast
import collections
import copy
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import threading
import traceback
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic, sleep, thread_time  # a patch of time.time does no harm

BEGAN = monotonic()     # before torch is imported, which takes seconds
# Waiting threads of torch shall sleep: on a busy machine, spinning was 15 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import requests
import torch
from torch.nn.functional import cross_entropy

# ---- 1  Scale: most constants have one value for CUDA, and one for all else ----------------------
# CUDA_VISIBLE_DEVICES=-1 hides all GPUs, also that of a Mac (MPS).
MPS = torch.backends.mps.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "-1"
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if MPS else "cpu"
CUDA = DEVICE == "cuda"
SEQ_LEN = 2048 if CUDA else 256        # tokens in a window, which is a stretch of the text
VOCAB_SIZE = 8192 if CUDA else 2048    # different tokens: 256 bytes, merges of them, and END
BUDGET = 300 if CUDA else 60           # seconds of training, on the clock of section 2
DEFAULT_DATA = "c4" if CUDA else "python"
EVAL_ROWS = 16 if CUDA else 8           # windows in a batch of evaluation
EVAL_WINDOWS = 512 if CUDA else 256     # windows of val, and of test, at most
MIN_WINDOWS = 64           # windows that each of val and test needs at least
# After the budget, train() may take OVERTIME * budget seconds, or ONE_STEP if that is more.
OVERTIME = 0.02            # to train on in this time would gain only 0.002 bits per byte
ONE_STEP = 0.1 if DEVICE == "cpu" else 1.0  # seconds: a last step may end so late
HICCUP = 1.0 if DEVICE == "cpu" else 5.0    # seconds that slow calls may add to evaluation
SETUP_LIMIT = 2 * BUDGET   # wall-clock seconds from the start of a run to its first batch
EVAL_LIMIT = 300           # wall-clock seconds of evaluation
END = VOCAB_SIZE - 1       # the token that ends a document; it stands for no bytes
HOME = os.environ.get("HOME", "/tmp")
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or f"{HOME}/.cache/autoresearch")


# ---- 2  The clock: it starts with the first batch and ends the loop over batches() at the budget -
# On a CPU it counts the time of the thread that trains, which other programs cannot change.
seconds_now = thread_time if DEVICE == "cpu" else monotonic
synchronize = torch.cpu.synchronize if DEVICE == "cpu" else torch.accelerator.synchronize


class Clock:
    """The budget of a run, and how much of it is used. tell() is explained in one_run()."""

    def __init__(self, tokens: np.ndarray, seed: int, budget: float, tell: Callable):
        self.tokens, self.budget, self.tell = tokens, budget, tell
        self.rng = np.random.default_rng(seed)      # decides the order of the windows
        self.start = None                           # seconds_now() at the first batch
        self.last = 0.0                             # seconds from then to the newest batch
        self.steps = self.seen = 0                  # batches and tokens handed out
        self.done = torch.cuda.Event() if CUDA else None    # marks the end of a GPU step


def batches(batch_size: int, seq_len: int = SEQ_LEN) -> Iterator[tuple]:
    """Yield (x, y, progress) until the budget is spent.

    x and y are int64 (batch_size, seq_len) on DEVICE; y[i, t] is the token after x[i, t].
    progress is the spent share of the budget, in [0, 1). measure() makes the `_clock` of a run.
    """
    clock, windows = _clock, _windows(_clock.tokens, seq_len, _clock.rng)
    if not 0 < seq_len < len(clock.tokens) // 2:
        raise ValueError(f"seq_len {seq_len}: there are {len(clock.tokens)} tokens to train on")
    while True:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("batches() belongs to the thread that calls train()")
        if clock.start is None:
            synchronize()
            times = 4 if DEVICE == "cpu" else 1 + OVERTIME      # others may use the CPU as well
            clock.tell("training", limit=times * clock.budget + 10)
            clock.startup, clock.start = monotonic() - BEGAN, seconds_now()
        batch = torch.from_numpy(np.stack([*itertools.islice(windows, batch_size)])).long()
        batch = (batch.pin_memory() if CUDA else batch).to(DEVICE, non_blocking=True)
        # The CPU prepares the next step while a GPU computes the newest one, so neither is idle.
        if CUDA and clock.steps != 1:
            clock.done.synchronize()    # waits for the step before the newest
            clock.done.record()         # lets the next call wait for the newest
        else:       # there is no CUDA, or the newest step is the first: wait for the newest itself
            synchronize()
        now = seconds_now() - clock.start
        # The next step takes as long as the last. On CUDA the newest has not ended yet, either.
        if now + (now - clock.last) * (2 if CUDA else 1) >= clock.budget:
            break
        if clock.steps == 0 or int(now) > int(clock.last):      # once per second
            clock.tell("progress", share=now / clock.budget,
                       tokens_per_second=clock.seen / (now or 1))
        clock.last = now
        clock.steps += 1
        clock.seen += batch_size * seq_len
        yield batch[:, :-1], batch[:, 1:], now / clock.budget


def _windows(tokens: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of length + 1 tokens forever. Each epoch cuts the text elsewhere."""
    # Wherever a run ends, it shall have seen all parts of the text alike: five windows come in the
    # order 0, 2, 4, 1, 3. In random order, scores scatter by 0.006 bits per byte, not 0.0025.
    golden_ratio = (1 + 5 ** 0.5) / 2       # its multiples, modulo 1, are spread most evenly
    while True:
        offset = rng.integers(length)
        count = (len(tokens) - 1 - offset) // length
        for i in np.argsort((np.arange(count) * golden_ratio + rng.random()) % 1):
            yield tokens[offset + i * length:offset + (i + 1) * length + 1]


# ---- 3  The metric: bits per byte of held-out text, and the probes that make it worth believing --
def bits_per_byte(nats: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Return the bits that a model needs per byte of text: sum of -log2 p / sum of bytes.

    nats: -ln p of each token (1 nat = 1.44 bits). lengths[token]: how many bytes it stands for.
    """
    sizes = lengths[tokens]
    bits = nats[sizes > 0] / math.log(2)        # END has no bytes, so it does not count
    return float(bits.sum() / sizes.sum())


class Invalid(Exception):
    """A run whose score would mean nothing. The text says why."""


@torch.no_grad()
def evaluate(model: torch.nn.Module, splits: dict, lengths: np.ndarray, slack: float = 0) -> dict:
    """Return {split: bits per byte}, or raise Invalid. `slack`: seconds that training left."""
    if "torch._dynamo" in sys.modules:      # compiling for other shapes takes a minute
        torch.compiler.set_stance("force_eager")
    rng = np.random.default_rng()       # no candidate knows its seed
    windows = min(EVAL_WINDOWS, *((len(tokens) - 1) // SEQ_LEN for tokens in splits.values()))
    windows -= windows % EVAL_ROWS
    chosen = [tokens[(len(tokens) - 1) // windows * i:][:SEQ_LEN + 1]   # from all over the text
              for tokens in splits.values() for i in range(windows)]
    chosen = np.stack(chosen).reshape(-1, EVAL_ROWS, SEQ_LEN + 1).astype(np.int64)
    x, y = chosen[..., :-1], chosen[..., 1:]
    cuts = choose_cuts(*x.shape, rng)
    moments = [seconds_now()]
    # Some models convert weights in their first call, so it gets random tokens and no score.
    token_nats(model, rng.integers(VOCAB_SIZE, size=x[0].shape), y[0], rng)
    # The model gets each batch twice: for its score, and as a probe: see choose_cuts().
    try:
        models = model, copy.deepcopy(model)    # the copy does not see the model's calls
    except Exception:                           # some models cannot be copied
        models = model, model
    moments.append(seconds_now())
    nats, turns = np.empty((2, *x.shape)), np.empty((2, len(x)))
    # The order is random, so that a model cannot tell a score (probe = 0) from a probe (1).
    for probe, i in rng.permutation(list(np.ndindex(turns.shape))):
        tokens, rows = x[i], rng.permutation(EVAL_ROWS)
        if probe:
            other = x[i - rng.integers(1, len(x))]      # of any other batch
            tokens = np.where(np.arange(SEQ_LEN) < cuts[i, :, None], tokens, rng.permutation(other))
        nats[probe, i, rows] = token_nats(models[probe], tokens[rows], y[i, rows], rng)
        turns[probe, i] = len(moments)
        moments.append(seconds_now())
    refuse_leaks(nats[1] - nats[0], cuts, turns[1] > turns[0])
    seconds = np.diff(moments)
    put_off = (seconds - 5 * np.median(seconds)).clip(0).sum()      # beyond 5 times the usual
    if not put_off <= max(slack, HICCUP):       # in the slack, train() could have done it
        raise Invalid(f"overtime: work of {put_off:.1f} s was put off until evaluation")
    parts = zip(splits, np.split(nats[0], len(splits)), np.split(y, len(splits)))
    return {split: bits_per_byte(*part, lengths) for split, *part in parts}


def token_nats(model: torch.nn.Module, x: np.ndarray, y: np.ndarray, rng) -> np.ndarray:
    """Return -ln p(y[i, t]) given x[i, :t+1]: two int64 (B, T) -> float32 (B, T)."""
    torch.manual_seed(int(rng.integers(2 ** 63)))   # torch's generator would count the calls
    # Only this line calls the candidate's model. The model may write into its copy of x.
    logits = model(torch.from_numpy(x).to(DEVICE, copy=True))
    refuse_patches()
    plain = type(logits) is torch.Tensor and torch.is_floating_point(logits)
    if not plain or logits.shape != (*x.shape, VOCAB_SIZE):
        got = f"{type(logits).__name__} {getattr(logits, 'shape', '')}"
        raise Invalid(f"not a plain tensor of floating-point logits, but {got}")
    logits = torch.Tensor.detach(logits)    # without attributes that a candidate set
    targets = torch.from_numpy(y).flatten().to(DEVICE)
    nats = cross_entropy(logits.float().flatten(0, 1), targets, reduction="none").cpu()
    if not nats.isfinite().all():       # -inf is fine for a token that never comes
        raise Invalid("logits that are not finite as float32")
    return nats.numpy().reshape(y.shape)


def choose_cuts(probes: int, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return where each row of each probe is cut: (probes, rows), in 1 ... length.

    A probe begins as a batch does, but after the cut a row goes on as a row of another batch:

        row      the  cat  sat  on      the  mat
        probe    the  cat  sat  rained  all  day     cut = 3

    The first 3 predictions, of "cat", "sat" and "on", come from the same tokens in both, so they
    have to be the same. The rows also change places: each has other neighbours in a probe.
    """
    # Half of the rows are cut at the end of a chunk of 2, 4, 8, ... tokens: a model that computes
    # in chunks leaks there. Half are cut anywhere, at no place twice before all had a turn.
    # One row stays whole, to show leaks from other rows and from earlier calls.
    chunk = 2 ** rng.integers(1, length.bit_length() - 1, (probes, rows))
    cuts = chunk * rng.integers(1, length // chunk)
    cuts[:, 1::2] = np.resize(1 + rng.permutation(length - 1), (probes, rows // 2))
    cuts[:, 0] = length
    return rng.permuted(cuts, axis=1)


# Rounding changes predictions, too, in bf16 by 0.01 nats. But it makes as many better as worse. A
# leak reads later tokens, which are false in a probe: predictions get worse, most of all right
# before a cut: where every 64th token sees one ahead, by 0.06 nats, and by 0.0004 on average.
BIAS = 0.002        # nats: how far from 0 a mean may be; seeds differ by more
SIGMAS = 6          # standard errors on top of it: rounding exceeds that in one of 10^8 runs
SPREAD = 0.02       # nats: limit for the size of a typical change; bf16 reaches half
LARGEST = 1.0       # nats: larger changes count as this much; rounding makes a few
GATHERED = 4        # of the 16 largest losses, so many may stand just before a cut


def refuse_leaks(change: np.ndarray, cuts: np.ndarray, probed_later: np.ndarray):
    """Raise Invalid if probes change predictions more than rounding. change: nats, (P, B, T)."""
    to_cut = cuts[..., None] - np.arange(change.shape[-1])
    kept = to_cut > 0
    change, last = change[kept], to_cut[kept] == 1      # last: those just before a cut
    small = change.clip(-LARGEST, LARGEST)
    # A model that learns from its calls does better in the later one of the two.
    learned = np.where(probed_later[kept.nonzero()[0]], small, -small)
    sigma = np.sqrt(np.square(small).mean())
    unbiased = all(np.abs(some.mean()) <= BIAS + SIGMAS * sigma / len(some) ** 0.5
                   for some in (small, small[last], learned))
    spread = max(np.abs(small).mean(), np.median(np.abs(small[last])))
    # A rare leak hardly changes a mean, but the predictions that lose most are just before cuts.
    largest = np.argsort(-change)[:16]
    gathered = (last & (change > SPREAD))[largest].sum()
    if not (unbiased and spread <= SPREAD and gathered <= GATHERED):        # a NaN is refused, too
        raise Invalid(f"leak: later tokens, other rows or earlier calls change predictions, by "
                      f"{small[last].mean():+.4f} nats just before them, {small.mean():+.4f} "
                      f"in all, {spread:.4f} in size, {learned.mean():+.4f} from call to call")


# ---- 4  One run: a fresh process, whose main is this file and never the candidate ----------------
MODULES = """__future__ bisect cmath collections contextlib copy dataclasses enum functools gc
    heapq itertools json math numpy operator prepare random re statistics string time torch types
    typing warnings""".split()
CONTRACT = f"""- The score, val_bpb, is the bits per byte of validation text: lower is better.
- Imports: {", ".join(MODULES)}.
  Files, processes, threads and the environment are closed, and the driver sets all seeds: leave out
  `import os` and torch.manual_seed. In getattr, write the name out. Of dunder names, use those of
  usual methods. A module's name may stand only before a dot.
- `import prepare` offers DEVICE, SEQ_LEN, VOCAB_SIZE and batches(batch_size, seq_len=SEQ_LEN).
- `train()` returns a torch.nn.Module with model(tokens) -> logits, int64 (B, T) -> float
  (B, T, VOCAB_SIZE), for evaluation at T = SEQ_LEN. Logits at t may depend on tokens[:t+1] of
  their own row alone, and on nothing of earlier calls: probes check it.
- `for x, y, progress in prepare.batches(...)` is the only training data and clock. The clock
  starts with the first batch and ends the loop at the budget; progress is in [0, 1). The loop goes
  on through epochs: in each, the text is cut into windows anew. A step is a batch.
- Before the loop, compiling and warming up are free for {SETUP_LIMIT} seconds. After it, train()
  has {OVERTIME:.0%} of the budget more, to average weights, say. Evaluation may take {EVAL_LIMIT}
  seconds, and no work may be put off until then. Replace no function that prepare.py uses."""


def one_run(path: Path, seed: int, budget: float, folder: Path, key: str | None) -> int:
    """Measure a train.py and return the exit code: 0 only after a report."""
    out = os.fdopen(os.dup(1), "w", buffering=1)    # a candidate can replace sys.stdout, not this
    encode = json.JSONEncoder().encode              # a candidate could alter that of json.dumps
    # An event is a line for the driver. It begins with a key that no candidate knows. An event
    # with a limit begins a phase: the next has to begin within so many wall-clock seconds.
    def tell(event: str, **values):
        if key:
            out.write(f"\n{key} {encode({'event': event, **values})}\n")
    if key:
        threading.Thread(target=end_with_driver, args=[os.dup(0)], daemon=True).start()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)    # a candidate's input() sees an empty file
    meta = json.loads((folder / "meta.json").read_text())
    # The driver compares no runs whose conditions differ, and shows the conditions to the LLM.
    conditions = meta | {
        "data": meta["name"], "budget": budget, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE,
        "prepare": sha256([Path(__file__)])[:16], "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if CUDA else DEVICE,
        "processor": f"{os.uname().machine}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads() if DEVICE == "cpu" else 0}
    tell("setup", limit=SETUP_LIMIT, contract=CONTRACT, **conditions)
    try:
        report = measure(path, seed, budget, folder, tell)
        tell("report", **report)
        for name, value in report.items():
            if not name.startswith("test_"):    # this log may go into a prompt
                shown = value if isinstance(value, str) else round(value, 6)
                print(f"{name + ':':17} {shown}", flush=True)
        return 0
    except Invalid as error:
        reason = str(error)
    except BaseException as error:      # even a candidate's sys.exit()
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:2000]
    tell("crash", reason=reason)
    print(f"autoresearch: this run is invalid: {reason}", file=sys.stderr, flush=True)
    return 1


def measure(path: Path, seed: int, budget: float, folder: Path, tell: Callable) -> dict:
    """Train a train.py once and return the report. What it gets of this file is a stub."""
    global _clock
    data = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in SPLITS}
    lengths = Tokenizer(json.loads((folder / "tokenizer.json").read_text())).lengths
    clock = _clock = Clock(data.pop("train"), seed, budget, tell)
    for set_seed in torch.manual_seed, np.random.seed, random.seed:
        set_seed(seed)
    stub = sys.modules["prepare"] = sys.modules["__main__"] = types.ModuleType("prepare")
    stub.DEVICE, stub.SEQ_LEN, stub.VOCAB_SIZE, stub.batches = DEVICE, SEQ_LEN, VOCAB_SIZE, batches
    refuse_source(code := path.read_text(encoding="utf-8"))
    candidate = sys.modules["candidate"] = types.ModuleType("candidate")
    candidate.__file__ = str(path)
    exec(compile(code, path, "exec"), vars(candidate))
    model = candidate.train()
    if not isinstance(model, torch.nn.Module):
        raise Invalid(f"train() returned {type(model).__name__}, not a torch.nn.Module")
    model.eval()        # this may do work, so the clock is read after it
    synchronize()
    if clock.start is None:
        raise Invalid("train() returned without drawing a batch from prepare.batches()")
    train_seconds = seconds_now() - clock.start
    slack = budget + max(OVERTIME * budget, ONE_STEP) - train_seconds
    if slack < 0:
        raise Invalid(f"overtime: train() took {train_seconds:.1f} s of a budget of {budget:g} s")
    refuse_patches()
    clock.budget = 0.0      # batches() yields nothing more
    tell("evaluation", limit=EVAL_LIMIT)
    unit = 1 if sys.platform == "darwin" else 1024      # bytes, of ru_maxrss
    memory = (torch.cuda.max_memory_allocated() if CUDA else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    num_params = sum(p.numel() for p in torch.nn.Module.parameters(model))
    bpb = evaluate(model, data, lengths, slack)
    epochs = clock.seen / len(clock.tokens)
    again = f", this run saw the text {epochs:.1f} times" if epochs > 1 else ""
    return {"val_bpb": bpb["val"], "test_bpb": bpb["test"], "train_seconds": train_seconds,
            "startup_seconds": clock.startup, "total_seconds": monotonic() - BEGAN,
            "peak_memory_mb": memory / 1e6, "num_steps": clock.steps, "num_tokens": clock.seen,
            "epochs": round(epochs, 3), "num_params": num_params,
            "did": f"{clock.steps} steps, {clock.seen / train_seconds:,.0f} tokens/s{again}"}


def end_with_driver(pipe: int):
    """End this process and its children when the driver, which holds `pipe` open, ends."""
    if os.read(pipe, 1):            # only a driver writes this byte
        open(pipe, "rb").read()     # this returns when the driver has ended
        os.kill(0, signal.SIGKILL)  # 0 means this process group
        os._exit(1)                 # kill() spares the first process of a container


# The guard stops sloppy and score-gaming candidates, not malware. refuse_source() reads them first.
# After train() and each call of the model, refuse_patches() looks for functions that changed.
DUNDERS = """add|call|class|constants|doc|enter|exit|file|future|getitem|init|iter|len|main|name|
    new|next|post_init|repr|setitem|slots|str|version"""
# PARTS of numpy and torch are closed, except what is OPEN. MEMBERS are closed in all modules.
PARTS = r"""_\w+|ao|classes|core|ctypeslib|distributed|export|f2py|fx|hub|jit|lib|library|monitor|
    multiprocessing|onnx|overrides|package|profiler|rec|serialization|storage|testing|utils"""
OPEN = """lib.stride_tricks|_dynamo.(config|disable|reset)|_inductor.config|jit.script|
    library.custom_op|utils.checkpoint"""
MEMBERS = r"""load\w*|save(z\w*|txt)?|memmap|from(file|regex)|genfromtxt|seed\w*|set_?state|
    default_rng|Random(State)?|Torch\w+Mode|attrgetter|methodcaller|make_dataclass|update_wrapper"""
CLOSED = "this is closed, as are files, processes and seeds: leave it out"
REFUSED = [     # (pattern, reason) for what uses() yields; (?x) lets a pattern have line ends
    (r"^Name (open|exec|eval|compile|globals|locals|vars)$", "no files, no text that runs as code"),
    (r"\b(default_generators?|manual_seed\w*|\w*rng_state\w*|set_num_\w*threads)\b",
     "the driver sets the seed and the threads: leave it out"),
    (r"\b(get|has|set|del)attr$", 'no computed names: write x.name = y or getattr(x, "name", 0)'),
    (r"^Attribute format(_map)?$", "no format(), which reads attributes: use f-strings"),
    (rf"(?x)__(?!({DUNDERS})__)[a-z]\w*?__", "no way into the interpreter"),
    (r"\b((ag|cr|gi|tb)_frame|f_(back|builtins|globals|locals))\b", "no way into the interpreter"),
    (r"\b(from_file|tofile|dump)\b", "no files"),
    (r"^module ", "a module stands only before a dot, as in torch.nn.Linear"),
    (rf"^path (?!({'|'.join(MODULES)})\b)|^path .*\*$", CLOSED),     # other modules, import *
    (rf"(?x)^path\ (numpy|torch)\.(?!({OPEN})\b)({PARTS})\.\w", CLOSED),
    (rf"(?x)^path\ .*\.({MEMBERS})$", CLOSED),
    (r"^path (numpy\.random|torch)\.Generator$|^path numpy\.random\.[A-Z]+\d", CLOSED),
    (r"^path (gc\.(get_|callbacks)|typing\.get_|string\.Formatter$)", CLOSED)]


def refuse_source(code: str):
    """Raise Invalid if a candidate's words, or what its names lead to, are closed to it."""
    tree = ast.parse(code)
    for node in ast.walk(tree):     # rewrite harmless forms, so that no pattern finds them
        match node:
            case ast.Expr(ast.Constant(str())):             # a docstring
                node.value.value = None
            case ast.Call(ast.Name("getattr"), [x, ast.Constant(str(name)), *rest]):    # x.name()
                node.func, node.args = ast.Attribute(x, name, lineno=node.lineno), rest
            case ast.Call(ast.Name("hasattr"), [x, *rest]):     # x.__doc__() stands for it
                node.func, node.args = ast.Attribute(x, "__doc__", lineno=node.lineno), rest
    for node, use in uses(list(ast.walk(tree))):
        for pattern, why in REFUSED:
            if re.search(pattern, use):
                line = code.split("\n")[node.lineno - 1].strip()
                raise Invalid(f"not allowed in line {node.lineno}: {line}: {why}")


def uses(nodes: list[ast.AST]) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, use): "Name open" for a word, "path torch.load" for a member of a module."""
    imported = collections.defaultdict(set)     # {"F": {"torch.nn.functional"}, ...}
    for node in nodes:
        for field in vars(node).values():
            words = field if isinstance(field, list) else [field]
            yield from ((node, f"{type(node).__name__} {x}") for x in words if isinstance(x, str))
        if isinstance(node, ast.Import | ast.ImportFrom):
            parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                # Appending .__name__, a text, keeps resolve() from refusing a module.
                yield from resolve(node, f"{parent}{alias.name}.__name__")
                name = alias.asname or alias.name.partition(".")[0]
                imported[name].add(parent + (alias.name if alias.asname else name))
    parts = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        match node:     # whole paths: torch.nn.Linear, but not the torch.nn in it
            case ast.Attribute() | ast.Name(ctx=ast.Load()) if node not in parts:
                name, dot, rest = ast.unparse(node).partition(".")
                for path in imported[name]:
                    yield from resolve(node, path + dot + rest)


def resolve(node: ast.AST, path: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield each beginning of a path, with modules by their real names: torch.os is os."""
    value = None        # so the first name is imported
    for name in path.split("."):
        place = f"{value.__name__}.{name}" if value else name
        yield node, f"path {place}"
        try:
            value = getattr(value, name, None) or importlib.import_module(place)
        except ImportError:         # the candidate may catch this
            return
        if not isinstance(value, types.ModuleType):
            return
    yield node, f"module {place}"       # the path ends at a module


def functions() -> set[tuple]:
    """Return (owner, name, function) of all functions that this file's verdict rests on."""
    owners = (*torch.Tensor.__mro__, torch.nn.Module, torch, torch.nn.functional, torch._C._nn,
              np, np.random, copy, math, json, json.encoder, json.JSONEncoder)
    changing = "manual_seed", "__init__", "__setstate__"    # torch replaces these by itself
    return {(owner, name, value) for owner in owners for name, value in vars(owner).items()
            if callable(value) and name not in changing}


BEFORE = functions()


def refuse_patches():
    """Raise Invalid if a candidate has replaced, added or deleted one of these functions."""
    if patches := BEFORE ^ functions():
        owner, name, _ = patches.pop()
        raise Invalid(f"a patch of {owner.__name__}.{name}: leave it as it is")


# ---- 5  Data: documents from a source, as one flat file of tokens per split ----------------------
SPLITS = "train", "val", "test"
PIECE = 20_000      # characters: longer texts are cut into such pieces, at line ends
SHORTEST = 64       # characters: shorter documents are dropped
HELD_OUT = 1_000_000    # bytes of val, and of test; 1% of the text at least, 8% at most
MANY_FILES = 50     # with so many files or more, each is whole in one split
# These are left out: not every Python has tests, and tables of codes are near copies.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "testing",
           "encodings", "pydoc_data", "serialized_patterns"}


def prepare(data: str | None) -> Path:
    """Make `data` ready and return its folder. Without `data`: the last one, or the default."""
    last = CACHE / f"current-v{VOCAB_SIZE}"     # a file that holds the last folder's name
    if not data and last.exists() and (CACHE / last.read_text() / "meta.json").exists():
        return CACHE / last.read_text()
    (CACHE / "downloads").mkdir(parents=True, exist_ok=True)
    print(f"preparing data in {CACHE}, or waiting for a process that does", flush=True)
    with (CACHE / "lock").open("a" if os.access(CACHE, os.W_OK) else "r") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name, files, reader = source(data or DEFAULT_DATA)
        folder = CACHE / f"{name}-v{VOCAB_SIZE}"
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.part")
            unfinished.mkdir(exist_ok=True)     # it exists if an earlier try was stopped
            make(unfinished, name, files, reader)
            os.sync()                           # all is on the disk before it gets its name
            unfinished.rename(folder)
        if lock.writable():     # or else this is a cache of others, to be read only
            last.write_text(folder.name)
    return folder


def make(folder: Path, name: str, files: list[Path], reader: Callable):
    """Fill `folder`: tokenizer.json, {train,val,test}.bin and meta.json."""
    total = sum(file.stat().st_size for file in files)
    total *= 2.5 if reader is json_texts else 1     # gzip has made C4 so many times smaller
    share = min(0.08, max(0.01, HELD_OUT / max(total, 1)))
    print(f"{name}: training a tokenizer of {VOCAB_SIZE} tokens", flush=True)
    texts = (text for split, text in documents(files, reader, share) if split == "train")
    merges = learn_merges(texts, VOCAB_SIZE - 257)
    (folder / "tokenizer.json").write_text(json.dumps(merges))
    tokenizer = Tokenizer(merges)
    bins = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
    count = size = shown = 0
    for split, text in documents(files, reader, share):
        tokens = np.append(tokenizer.encode(text), np.uint16(END))
        bins[split].write(tokens)
        count, size = count + 1, size + int(tokenizer.lengths[tokens].sum())
        if size > shown + 0.05 * total:
            print(f"encoding: {size / 1e6:.0f} of about {total / 1e6:.0f} MB", flush=True)
            shown = size
    sizes = {split: file.tell() // 2 for split, file in bins.items()}
    for file in bins.values():
        file.close()
    need = MIN_WINDOWS * SEQ_LEN + 1        # tokens, with less than 5 bytes each
    if min(sizes["val"], sizes["test"]) < need:
        sys.exit(f"prepare.py: too little text in {name}: {len(files)} files have {size / 1e6:.2f} "
                 f"MB in documents of {SHORTEST} characters or more, and a score needs about "
                 f"{5 * need / share / 1e6:.1f} MB")
    bytes_per_token = round(size / (sum(sizes.values()) - count), 4)    # not counting END
    print(f"{name}: {count} documents, {size / 1e6:.1f} MB, {bytes_per_token} bytes per token")
    (folder / "meta.json").write_text(json.dumps({
        "name": name, "documents": count, "bytes_per_token": bytes_per_token,
        "train_tokens": sizes["train"], "sha256": sha256([folder / f"{s}.bin" for s in SPLITS])}))


def source(data: str) -> tuple[str, list[Path], Callable[[Path], Iterator[str]]]:
    """Download what is missing. Return a name, files, and the function that reads a file."""
    if data == "tinystories":
        stories = "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"
        return data, [download(stories)], text_pieces
    c4 = re.fullmatch(r"c4(?::(\d+))?", data)
    if c4 and 1 <= (shards := int(c4[1] or 4)) <= 1024:
        shard = "allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"
        return f"c4-{shards}", [download(shard.format(i)) for i in range(shards)], json_texts
    if data in ("python", "stdlib"):
        name, modules = data, [os] if data == "stdlib" else [os, torch, np]
        folders = [Path(module.__file__).parent for module in modules]
        files = [file for folder in folders for file in sorted(folder.rglob("*.py"))
                 if not SKIPPED & {*file.relative_to(folder).parts}]
    elif (path := Path(data)).exists():
        name = re.sub(r"\W+", "-", path.resolve().name, flags=re.ASCII)[:40]
        visible = [f for f in sorted(path.rglob("*")) if "/." not in f"/{f.relative_to(path)}"]
        # rglob() finds nothing in a file. Links to folders are counted as skipped below.
        files = [f for f in visible or [path] if f.is_symlink() or not f.is_dir()]
    else:
        sys.exit(f"prepare.py: --data {data}: give python, stdlib, tinystories, c4, c4:N with N "
                 f"from 1 to 1024 shards, or a file or folder that exists")
    good = [file for file in files if is_text(file)]
    if good != files:
        print(f"{name}: skipped {len(files) - len(good)} of {len(files)} files: empty, unreadable, "
              f"links to folders, or not UTF-8 text")
    return f"{name}-{sha256(good)[:8]}", good, text_pieces


def is_text(path: Path) -> bool:
    """Return whether a file is UTF-8 text, without zero bytes at its start, as UTF-16 has."""
    try:
        text = path.read_text("utf-8") if path.is_file() else ""
        return text != "" and "\0" not in text[:PIECE]
    except (OSError, UnicodeDecodeError):
        return False


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the documents of a text file, separated by <|endoftext|>. Long ones are cut."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        # A chunk goes on to the end of a line, but not further than 2 * PIECE characters.
        while chunk := file.read(PIECE) + file.readline(PIECE):
            if re.search(r"<\|?\w*\|?\Z", chunk):       # perhaps half of the mark
                chunk += file.readline(12)      # the mark has 13 characters
            *whole, rest = (rest + chunk).split("<|endoftext|>")
            yield from whole
            if len(rest) >= PIECE:
                yield rest
                rest = ""
    yield rest


def json_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a gzip file of JSON lines, as C4 has: {"text": ..., ...}"""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    except Exception as error:
        sys.exit(f"prepare.py: {path} is corrupt ({error}): delete it, to fetch it again")


def documents(files: list[Path], reader: Callable, share: float) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of each document, always in one order. val and test get `share` each."""
    shares = {"train": 1 - 2 * share, "val": share, "test": share}
    seen, size = set(), dict.fromkeys(SPLITS, 0)
    # One half of a file helps to predict the other, so a file is whole in one split: unless there
    # are few files, or it is larger than val. Files in a folder are alike, so they are shuffled.
    many = reader is text_pieces and len(files) >= MANY_FILES
    total = sum(file.stat().st_size for file in files)
    for file in random.Random(0).sample(files, len(files)) if many else files:
        split = None
        whole = many and file.stat().st_size <= share * total
        for text in reader(file):
            if len(text.strip()) < SHORTEST or hash(text) in seen:
                continue
            seen.add(hash(text))    # in memory: 100 bytes per document
            if not whole or split is None:
                # The split that lacks most gets it: val and test come from all over the text.
                split = min(SPLITS, key=lambda s: size[s] / shares[s])
            size[split] += len(text)
            yield split, text


def download(address: str) -> Path:
    """Fetch a file from Hugging Face, unless it is there. Go on where an earlier try stopped."""
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    path = CACHE / "downloads" / Path(address).name
    part, pauses = path.with_name(f"{path.name}.part"), [1, 4, 16, 64]      # seconds
    while not path.exists():
        try:
            fetch_rest(f"{hub}/datasets/{address}", part)
            part.replace(path)
        except requests.RequestException as error:
            if not pauses:
                raise
            print(f"{path.name}: {error}; again in {pauses[0]} s", file=sys.stderr)
            sleep(pauses.pop(0))
    return path


def fetch_rest(url: str, path: Path):
    """Append to the file at `path` what it lacks of the one at `url`."""
    with path.open("ab") as file:
        headers = {"Range": f"bytes={file.tell()}-", "Accept-Encoding": "identity"}
        answer = requests.get(url, stream=True, timeout=30, headers=headers)
        if answer.status_code == 416 and file.tell():       # nothing is left to fetch
            return
        answer.raise_for_status()
        chunks = answer.iter_content(1 << 16)       # raises if less comes than was announced
        first = next(chunks, b"")
        if not first or re.match(rb"\s*<(!doctype|html)", first, re.IGNORECASE):    # a login page
            raise requests.ConnectionError("a web page came, or nothing")
        if answer.status_code != 206:       # the server ignores Range and sends all
            file.truncate(0)
        file.writelines(itertools.chain([first], chunks))


def sha256(paths: list[Path]) -> str:
    """Return one fingerprint of the contents of files, none of them empty."""
    each = [hashlib.sha256(np.memmap(path, mode="r")).digest() for path in paths]
    return hashlib.sha256(b"".join(each)).hexdigest()


# ---- 6  Tokenizer: byte-pair encoding (Sennrich et al. 2016, arxiv.org/abs/1508.07909) over words
# A text is cut into words, as in GPT-2, and tokens never go across them. A letter keeps its marks,
# which \w does not match: vowels of Hindi and Thai, say. A limit of length keeps encoding fast.
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
WORD = re.compile(rf"""(?x)
      [ ]?(?:[^\W\d][{MARKS}]{{0,4}}){{1,32}}   # letters with their marks, perhaps after a space
    | \d{{1,3}}                                 # digits
    | [ ]?[^\s\w]{{1,16}}                       # punctuation, perhaps after a space
    | \s{{1,64}}(?!\S)                          # white space, but not the last one before a word
    | \s                                        # that last one, where it is not in the word""")
SAMPLE = 64_000_000     # characters of training text that the merges are learned from
COMMON = 50_000         # most frequent words that count; 200,000 bring nothing more


class Tokenizer:
    """Text to tokens: 0 ... 255 are bytes, 256 + i is the pair `merges[i]`, the last is END.

    >>> Tokenizer([(104, 105)]).encode("hi, hi").tolist()
    [256, 44, 32, 256]
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {}              # pair -> its token
        lengths = [1] * 256         # of each token, in bytes
        for left, right in merges:
            self.rank[chr(left) + chr(right)] = len(lengths)
            lengths.append(lengths[left] + lengths[right])
        self.lengths = np.array(lengths + [0] * (VOCAB_SIZE - len(lengths)))    # the last is END
        self.encode_word = functools.lru_cache(1_000_000)(self.encode_word)     # 300 MB in memory

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, as uint16."""
        tokens = "".join(map(self.encode_word, WORD.findall(text)))
        return np.frombuffer(tokens.encode("utf-16-le"), "<u2")

    def encode_word(self, word: str) -> str:
        """Return the tokens of a word: again and again, merge the pair that was learned first."""
        # Each token is the character with its number, so that str.replace() can merge pairs.
        word = word.encode("utf-8", "surrogatepass").decode("latin-1")
        while mergeable := [a + b for a, b in itertools.pairwise(word) if a + b in self.rank]:
            pair = min(mergeable, key=self.rank.get)
            word = word.replace(pair, chr(self.rank[pair]))
        return word


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[int, int]]:
    """Return at most `count` merges: again and again, the most frequent pair of neighbours."""
    counter, characters = collections.Counter(), 0
    for text in texts:
        counter.update(WORD.findall(text))
        if (characters := characters + len(text)) > SAMPLE:
            break
    common = counter.most_common(COMMON)
    words = [word.encode("utf-8", "surrogatepass").decode("latin-1") for word, _ in common]
    counts = collections.Counter()              # pair -> how often it occurs
    where = collections.defaultdict(set)        # pair -> words that have it, or had it once

    def count_pairs(i: int, times: int):
        for a, b in itertools.pairwise(words[i]):
            counts[a + b] += times
            where[a + b].add(i)
    for i, (_, times) in enumerate(common):
        count_pairs(i, times)
    merges = []
    while len(merges) < count and (most := max(counts.values(), default=0)) > 1:
        pair = min(pair for pair, times in counts.items() if times == most)
        for i in where.pop(pair):               # only words with the pair change
            count_pairs(i, -common[i][1])
            words[i] = words[i].replace(pair, chr(256 + len(merges)))
            count_pairs(i, common[i][1])
        merges.append((ord(pair[0]), ord(pair[1])))
        if len(merges) % 300 == 0:
            print(f"learning to tokenize: {len(merges)} of {count} merges", flush=True)
    return merges


# ---- 7  Command line -----------------------------------------------------------------------------
def by_hand(path: str):
    """Run the train.py at `path` as the driver would, in a process of its own."""
    os.execv(sys.executable, [sys.executable, __file__, "--run", path])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", help="python, stdlib, tinystories, c4[:SHARDS], or a file or folder of text")
    add("--run", metavar="TRAIN_PY", type=Path, help="train and measure this file once")
    add("--seed", type=int, default=0, help="with --run")
    add("--budget", type=float, default=BUDGET, help="with --run: training seconds (%(default)s)")
    add("--folder", type=Path, help="with --run: a prepared folder, instead of the last one")
    add("--key", help="with --run: begin lines for the driver with this")
    add("--devices", action="store_true", help="print names for CUDA_VISIBLE_DEVICES, and end")
    args = parser.parse_args()
    sys.argv[1:] = sys.orig_argv[1:] = []       # no candidate may know the key
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: no traceback
    if args.devices:
        count = torch.cuda.device_count()       # without hidden ones
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        # CUDA shows a process one MIG slice (a part of a GPU), and device_count() is too low.
        return print(names if names.startswith("MIG-") else ",".join(names.split(",")[:count]))
    try:
        path = args.run and args.run.resolve(strict=True)
        torch.ones(1, device=DEVICE)    # fails if torch has no kernels for this GPU
        free, total = torch.cuda.mem_get_info() if CUDA else (1, 1)
        if free < 0.9 * total - 1e9:        # CUDA itself takes up to 1 GB
            print("WARNING: another program uses this GPU: see nvidia-smi", file=sys.stderr)
        folder = args.folder or prepare(args.data)
        if path:
            sys.exit(one_run(path, args.seed, args.budget, folder, args.key))
        print(folder)       # the driver reads this line
    except (OSError, RuntimeError, UnicodeError) as error:
        problem = str(error).partition("\n")[0]
        sys.exit(f"prepare.py: {problem}: --data python needs no network; "
                 f"CUDA_VISIBLE_DEVICES=-1 hides the GPU; AUTORESEARCH_CACHE replaces {CACHE}")


if __name__ == "__main__":
    main()
