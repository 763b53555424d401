"""The ground that stands still: data, tokenizer, batches, the clock and the metric.

    python prepare.py                     # what was prepared last; at first c4, stdlib without CUDA
    python prepare.py --data stdlib       # the Python sources of every installation; no network
    python prepare.py --data tinystories  # children's stories, 2.2 GB
    python prepare.py --data c4:8         # eight shards of web text, 0.8 GB each
    python prepare.py --data my/texts     # a file or a folder of UTF-8 text of your own

Nobody edits this file during research, so two scores can be compared. It does not cover code that
attacks the machine: a train.py runs with your rights. README.md shows the line for a sandbox.
"""
# ruff: noqa: E402  (what has to be done before torch is imported stands before it)

import argparse
import ast
import collections
import copy
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic, thread_time  # by name: a candidate may patch time

try:
    import fcntl
    import resource
except ModuleNotFoundError as missing:
    raise SystemExit(f"prepare.py: {missing}. On Windows, run this inside WSL2") from None

BEGAN = monotonic()     # before the seconds that torch takes to import

# Threads that spin while they wait made a run on a busy machine 15 times slower. torch reads this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import requests
import torch
from torch.nn.functional import cross_entropy

# ---- 1  Scale: most constants have one value for CUDA, and one for all else ----------------------

DEVICE = ("cuda" if torch.cuda.is_available() else
          "mps" if torch.backends.mps.is_available() else "cpu")
CUDA = DEVICE == "cuda"
SEQ_LEN = 2048 if CUDA else 256        # tokens in a window of evaluation, by default of training
VOCAB_SIZE = 8192 if CUDA else 2048    # tokens: 256 bytes, the merges, one that ends a document
BUDGET = 300 if CUDA else 60           # seconds of training in a run
DEFAULT_DATA = "c4" if CUDA else "stdlib"

EVAL_ROWS = 16 if CUDA else 8           # windows in a batch of evaluation
EVAL_WINDOWS = 512 if CUDA else 256     # windows evaluated in val and in test, if there are so many
MIN_WINDOWS = 64           # below this a score would say little
OVERTIME = 0.02            # share of the budget for work after the last batch; worth 0.002 bpb ...
ONE_STEP = 0.1 if DEVICE == "cpu" else 1.0      # ... or so many seconds, if that is more
# Seconds that calls of evaluation may take too long: a CPU is interrupted; a GPU's is an estimate.
HICCUP = 1.0 if DEVICE == "cpu" else 5.0
SETUP_LIMIT = 2 * BUDGET   # wall-clock seconds for start and compilation, before the first batch
EVAL_LIMIT = 180 if CUDA else 300               # wall-clock seconds for evaluation

END = VOCAB_SIZE - 1       # the token that ends a document; it stands for no bytes
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def sha256(paths: list[Path]) -> str:
    """Return one fingerprint of the contents of files, none of them empty."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(np.memmap(path, mode="r"))    # never in memory as a whole
        digest.update(b"\xff")      # where a file ends; UTF-8 never has this byte
    return digest.hexdigest()


def check_card():
    """End if torch cannot compute on the GPU; warn if it sees none where one is."""
    try:
        torch.ones(1, device="cuda" if CUDA else "cpu").item()      # the smallest of kernels
    except RuntimeError as error:
        sys.exit(f"prepare.py: {str(error).splitlines()[0]}: torch is built for "
                 f"{torch.cuda.get_arch_list()}, the GPU is {torch.cuda.get_device_capability()}: "
                 f"install a torch for it, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU")
    # CUDA_VISIBLE_DEVICES hides a GPU on purpose.
    if DEVICE == "cpu" and "CUDA_VISIBLE_DEVICES" not in os.environ and shutil.which("nvidia-smi"):
        print(f"WARNING: torch {torch.__version__} (CUDA: {torch.version.cuda}) cannot use the "
              f"NVIDIA GPU: install a torch for the CUDA that nvidia-smi names", file=sys.stderr)


# ---- 2  The clock: it starts with the first batch and ends the loop over batches() at the budget -

# On a CPU, the CPU time of the thread that calls train(): another program then decides no verdict.
seconds_now = thread_time if DEVICE == "cpu" else monotonic
synchronize = torch.cpu.synchronize if DEVICE == "cpu" else torch.accelerator.synchronize


class Clock:
    """The budget of a run, and what the run has used of it."""

    def __init__(self, tokens: np.ndarray, seed: int, budget: float, tell: Callable):
        self.tokens, self.budget = tokens, budget
        self.tell = tell        # tell("phase", limit=s): the next phase begins within s seconds
        self.rng = np.random.default_rng(seed)      # of the order of the windows
        self.thread = threading.get_ident()         # the one whose time counts
        self.start: float | None = None             # there is none before the first batch
        self.startup = 0.0                          # wall-clock seconds before the first batch
        self.steps = self.seen = 0                  # batches and tokens handed out


def _windows(tokens: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of length + 1 tokens forever. Each epoch has all of them, at a new offset."""
    # Five windows come in the order 0, 2, 4, 1, 3: wherever a run ends, it has seen all parts of
    # the text alike. Scores of equal steps scatter by 0.0025 bpb so, and by 0.006 if shuffled.
    golden_ratio = (1 + 5 ** 0.5) / 2       # its multiples, modulo 1, are spread most evenly (Weyl)
    while True:
        offset = rng.integers(length)
        count = (len(tokens) - 1 - offset) // length
        for i in np.argsort((np.arange(count) * golden_ratio + rng.random()) % 1):
            yield tokens[offset + i * length:offset + (i + 1) * length + 1]


def batches(batch_size: int, seq_len: int = SEQ_LEN) -> Iterator[tuple]:
    """Yield (x, y, progress) until the budget is spent.

    x, y: int64 (batch_size, seq_len) on DEVICE; y[i, t] is the token after x[i, t]. progress: the
    share of the budget that is spent, in [0, 1). The first batch starts the clock.
    """
    clock, windows = _clock, _windows(_clock.tokens, seq_len, _clock.rng)
    if not 0 < seq_len < len(clock.tokens) // 2:
        raise ValueError(f"seq_len {seq_len}: there are {len(clock.tokens)} tokens to train on")
    done = torch.cuda.Event() if CUDA else None     # when the GPU is done with a step
    last, reported = math.inf, -math.inf    # times of the last batch, of the last progress event
    while True:
        if threading.get_ident() != clock.thread:
            raise RuntimeError("batches() belongs to the thread that calls train()")
        batch = np.stack(list(itertools.islice(windows, batch_size))).astype(np.int64)
        pinned = torch.from_numpy(batch).pin_memory() if CUDA else torch.from_numpy(batch)
        batch = pinned.to(DEVICE, non_blocking=True)
        if CUDA and clock.steps > 1:    # the GPU always has one more step to do, never two
            done.synchronize()          # with the step before the last
            done.record()
        else:                           # the first step is timed to its end, before a second
            synchronize()
        if clock.start is None:
            cap = 4 * clock.budget if DEVICE == "cpu" else clock.budget * (1 + OVERTIME)
            clock.tell("training", limit=cap + 10)      # 4: a CPU may have other load
            clock.startup, clock.start = monotonic() - BEGAN, seconds_now()
        now = seconds_now() - clock.start
        step, last = max(0.0, now - last), now          # 0 at the first of a loop
        # No batch without the time that the last one took. A GPU is still at the last one.
        if now + step * (2 if CUDA else 1) >= clock.budget:
            break
        if now - reported >= 1:
            reported = now
            speed = clock.seen / (now or 1)
            clock.tell("progress", share=now / clock.budget, tokens_per_second=speed)
        clock.steps += 1
        clock.seen += batch_size * seq_len
        yield batch[:, :-1], batch[:, 1:], now / clock.budget


# ---- 3  The metric: bits per byte of held-out text, and the probes that make it worth believing --

def bits_per_byte(nats: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Return the bits that a model needs for a byte of text: sum of -log2 p / sum of bytes.

    nats: -ln p of each token, given those before it. lengths[token]: how many bytes it stands for.
    """
    sizes = lengths[tokens]
    bits = nats[sizes > 0] / math.log(2)        # END has no bytes, so it does not count
    return float(bits.sum() / sizes.sum())


class Invalid(Exception):
    """A run whose score would mean nothing. The text says why."""


def token_nats(model: torch.nn.Module, x: np.ndarray, y: np.ndarray, rng) -> np.ndarray:
    """Return -ln p(y[i, t]) given x[i, :t+1]: two int64 (B, T) -> float32 (B, T)."""
    torch.manual_seed(int(rng.integers(2 ** 63)))   # torch's random state remembers no call
    # Nothing else is asked of a candidate. A judge in a process of its own would begin here.
    logits = model(torch.from_numpy(x).to(DEVICE, copy=True))       # it may write into its copy
    if type(logits) is not torch.Tensor:
        raise Invalid(f"not a plain tensor of logits, but {type(logits).__name__}")
    shape = *x.shape, VOCAB_SIZE
    if logits.shape != shape or not logits.is_floating_point():
        raise Invalid(f"not floating-point logits {shape}, but {logits.dtype} {logits.shape}")
    logits = logits.float()
    targets = torch.from_numpy(y).flatten().to(DEVICE)
    nats = cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(y.shape).cpu()
    if not nats.isfinite().all():       # of the nats: -inf for a token that never comes is fair
        raise Invalid("logits that are not finite, or not so as float32")
    i, t = (int(rng.integers(size)) for size in x.shape)    # a token by hand: is torch still torch?
    row, top = logits[i, t].tolist(), logits[i, t].max().item()
    nat = math.log(sum(math.exp(logit - top) for logit in row)) + top - row[y[i, t]]
    if not math.isclose(nat, nats[i, t], rel_tol=1e-4, abs_tol=1e-3):   # float32: 1e-6
        raise Invalid("torch no longer computes cross_entropy: part of it was replaced")
    return nats.numpy()


# A probe asks about a row of a batch again, and lets it go on differently from a cut on:
#
#     row      the  cat  sat  on      the  mat
#     other    in   may  it   rained  all  day     a row of another batch
#     probe    the  cat  sat  rained  all  day     cut = 3
#
# The first 3 predictions, of "cat", "sat" and "on", had the same tokens to go by, and may not
# change. The rows of a probe also change places, so that each has other neighbours.


def choose_cuts(probes: int, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return where each row of each probe is cut: (probes, rows), in 1 ... length."""
    chunk = 2 ** rng.integers(1, length.bit_length() - 1, (probes, rows))
    cuts = chunk * rng.integers(1, length // chunk)         # at ends of chunks of 2, 4, 8, ...
    cuts[:, 1::2] = np.resize(1 + rng.permutation(length - 1), (probes, rows // 2))     # all over
    cuts[:, 0] = length                                     # one row a probe is whole
    return rng.permuted(cuts, axis=1)


# Rounding changes predictions too: with experts or atomics, a bf16 logit of 4 by 0.01, and by 1 in
# a few tokens. It has no direction and no place. What is gained by seeing too much has both.
BIAS = 0.002        # nats: how far from 0 a mean may be; 0.001 bpb, far below the noise of seeds
SIGMAS = 6          # standard errors on top of it: rounding gets there in one of 10^8 runs
SPREAD = 0.02       # nats, the mean size everywhere, the median at the cuts: twice that of bf16
LARGEST = 1.0       # nats, what one token counts at most in a mean: a few near-ties are no leak
GATHERED = 2, 4     # at most so many of the 3, and of the 16, largest losses may be at cuts


def refuse_leaks(loss: np.ndarray, cuts: np.ndarray, probed_later: np.ndarray):
    """Raise Invalid if predictions lost, in nats (P, B, T), more than rounding takes."""
    to_cut = cuts[..., None] - np.arange(loss.shape[-1])    # above 0: has to stay as it is
    stays, sign = to_cut > 0, np.where(probed_later, 1, -1)[:, None, None]
    small = loss.clip(-LARGEST, LARGEST)
    before, at_cut, learned = small[stays], small[to_cut == 1], (small * sign)[stays]
    sigma = np.sqrt(np.square(before).mean())
    unbiased = all(np.abs(some.mean()) <= BIAS + SIGMAS * sigma / len(some) ** 0.5
                   for some in (before, at_cut, learned))
    spread = max(np.abs(before).mean(), np.median(np.abs(at_cut)))
    # Noise hides a rare leak in a mean, but not at cuts among the largest losses.
    largest = np.argsort(-loss[stays])[:16]
    hits = ((to_cut[stays] == 1) & (loss[stays] > SPREAD))[largest]
    gathered = hits[:3].sum() > GATHERED[0] or hits.sum() > GATHERED[1]
    if not (unbiased and spread <= SPREAD and not gathered):        # a NaN is refused
        mps = " (torch's half-precision attention leaks: pytorch issue 195910)" * (DEVICE == "mps")
        raise Invalid(f"leak: later tokens, other rows or earlier calls change predictions: by "
                      f"{at_cut.mean():+.4f} nats just before them, {before.mean():+.4f} in all, "
                      f"{spread:.4f} in size, {learned.mean():+.4f} from call to call{mps}; logits "
                      f"may depend on tokens[:t+1] of their row alone (fp8 by batch mixes rows)")


@torch.no_grad()
def evaluate(model: torch.nn.Module, splits: dict, lengths: np.ndarray, slack: float = 0) -> dict:
    """Return {split: bits per byte} of {split: tokens}. Raises Invalid if it knows too much."""
    rng = np.random.default_rng()       # seeded by the system: no candidate knows it
    windows = min(EVAL_WINDOWS, *((len(tokens) - 1) // SEQ_LEN for tokens in splits.values()))
    size = windows // EVAL_ROWS * EVAL_ROWS * SEQ_LEN
    text = np.stack([tokens[:size + 1] for tokens in splits.values()]).astype(np.int64)
    x, y = (part.reshape(-1, EVAL_ROWS, SEQ_LEN) for part in (text[:, :-1], text[:, 1:]))
    cuts = choose_cuts(*x.shape, rng)
    times = [seconds_now()]             # and then after each call
    # A first call, on tokens that mean nothing: some models fold their weights together in it.
    token_nats(model, rng.integers(VOCAB_SIZE, size=x[0].shape), y[0], rng)
    try:
        models = model, copy.deepcopy(model)    # the copy does not know what the model answers
    except Exception:                           # something cannot be copied: probe it as it is
        models = model, model
    times.append(seconds_now())
    nats, turns = np.empty((2, *x.shape)), np.empty((2, len(x)))
    # Each batch is scored once and probed once, all in one random order.
    for probe, i in rng.permutation(list(np.ndindex(turns.shape))):
        tokens, rows = x[i], rng.permutation(EVAL_ROWS)
        if probe:
            other = rng.permutation(x[i - rng.integers(1, len(x))])
            tokens = np.where(np.arange(SEQ_LEN) < cuts[i, :, None], tokens, other)
        nats[probe, i, rows] = token_nats(models[probe], tokens[rows], y[i, rows], rng)
        turns[probe, i] = len(times)
        times.append(seconds_now())
    refuse_leaks(nats[1] - nats[0], cuts, turns[1] > turns[0])
    seconds = np.diff(times)
    put_off = (seconds - 5 * np.median(seconds)).clip(0).sum()      # what some took much longer
    if not put_off <= max(slack, HICCUP):
        raise Invalid(f"overtime: work of {put_off:.1f} s was put off until evaluation")
    parts = zip(splits, np.split(nats[0], len(splits)), np.split(y, len(splits)))
    return {split: bits_per_byte(*part, lengths) for split, *part in parts}


# ---- 4  One run: a fresh process, whose main is this file and never the candidate ----------------

# The candidate runs in the process that judges it, and knows a stub of this file with four names.
# The driver believes only lines that begin with the key of the run: it is on the command line, as
# that passes through every launcher, and gone from sys.argv before the candidate begins.

# A candidate may use what torch and numpy hold themselves. Of what lies deeper, this is open to it:
OPEN = [f"torch.{path}." for path in """_dynamo.config _inductor.config accelerator amp autograd
    backends compiler cpu cuda distributions fft func jit.script library.custom_op linalg mps nested
    nn ops optim random sparse special utils.checkpoint version""".split()]
OPEN += ["numpy.fft.", "numpy.lib.stride_tricks.", "numpy.linalg.", "numpy.random."]
CLOSED = re.compile(r"""(?x)    # by the name that an object gives itself
    (numpy | torch)\.(load\w* | save(z\w* | txt)? | memmap | from(file|regex) | genfromtxt)
    | (numpy | random | torch)\.(seed\w* | set_?state | default_rng | Generator | Random(State)?
        | [A-Z]+\d+\w*)     # SFC64, PCG64, MT19937
    | gc\.get_\w+ | operator\.(attrgetter | methodcaller) | string\.Formatter | typing\.get_\w+""")


def objection(path: str, is_set: bool) -> str:
    """Return why a candidate may not use, or set, what a path like torch.nn.Linear leads to."""
    root, *parts = path.split(".")
    is_open = OPEN if root in ("numpy", "torch") else [f"{root}."]
    value, prefix = sys.modules[root], f"{root}."
    while parts and isinstance(value, types.ModuleType):
        prefix, value = f"{value.__name__}.{parts[0]}.", getattr(value, parts.pop(0), None)
        if is_module := isinstance(value, types.ModuleType):
            prefix = f"{value.__name__}."            # torch.importlib is importlib
        allowed = any(name.startswith(prefix) or prefix.startswith(name) for name in is_open)
        if not allowed and (is_module or prefix.count(".") > 2):    # torch.relu needs none
            return f"{prefix[:-1]} is closed to a candidate"
        if CLOSED.fullmatch(f"{root}.{getattr(value, '__name__', '')}"):
            return "no files, no seeds, no attributes by computed names"
    if is_set and not re.match(r"torch\.(backends|_\w+\.config)\.", prefix):
        return "only settings may be assigned"
    return "a module stands only before a dot" if isinstance(value, types.ModuleType) else ""


def refuse_modules(source: str):
    """Raise Invalid where a name leads to what is closed to a candidate, however it is called."""
    nodes, bound = list(ast.walk(ast.parse(source))), set()     # ("F", "torch.nn.functional"), ...
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "train.py", "exec"), {})   # loads submodules
            parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                first = alias.name.partition(".")[0]        # `import torch.nn` binds torch
                path = alias.name if alias.asname else first
                bound.add((alias.asname or first, parent + path))
    dotted = {node.value: node for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            for path in [path for name, path in bound if name == node.id]:
                last = node
                while last in dotted:       # from F to F.relu
                    last = dotted[last]
                    path += f".{last.attr}"
                if why := objection(path, not isinstance(last.ctx, ast.Load)):
                    raise Invalid(f"not allowed in line {node.lineno}: {ast.unparse(last)}: {why}")


def end_with_driver(pipe: int):
    """End this process and its children when the driver, which holds `pipe` open, ends."""
    if os.read(pipe, 1):                # hello; a launcher may forward no stdin
        open(pipe, "rb").read()         # returns at the end
        os.kill(0, signal.SIGKILL)      # 0: all of the own process group
        os._exit(1)                     # SIGKILL spares the init of a container


def conditions(folder: Path, budget: float) -> dict:
    """Return what makes two scores comparable, and what a researcher should know of the machine."""
    meta, info = json.loads((folder / "meta.json").read_text()), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = f"{[*names, os.uname().machine][0]}, {os.cpu_count()} cores"
    return meta | {
        "data": meta["name"], "budget": budget, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE,
        "prepare": sha256([Path(__file__)])[:16], "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if CUDA else DEVICE, "processor": cpu,
        "threads": torch.get_num_threads() if DEVICE == "cpu" else 0,
        "evaluation_limit": EVAL_LIMIT, "evaluation_windows": 2 * EVAL_WINDOWS,
        "bf16": (torch.cuda.is_bf16_supported(including_emulation=False) if CUDA else
                 DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported())}


def measure(path: Path, seed: int, budget: float, folder: Path, tell: Callable) -> dict:
    """Train the train.py at `path` once, and return the report. Raises what train() raises."""
    global _clock       # of the run in this process
    data = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in SPLITS}
    lengths = Tokenizer(json.loads((folder / "tokenizer.json").read_text())).lengths
    clock = _clock = Clock(data.pop("train"), seed, budget, tell)
    for set_seed in torch.manual_seed, np.random.seed, random.seed:
        set_seed(seed)
    stub = types.ModuleType("prepare", "what a train.py may use of prepare.py")
    stub.DEVICE, stub.SEQ_LEN, stub.VOCAB_SIZE, stub.batches = DEVICE, SEQ_LEN, VOCAB_SIZE, batches
    sys.modules["prepare"] = sys.modules["__main__"] = stub
    source = path.read_text(encoding="utf-8")
    refuse_modules(source)
    candidate = sys.modules["candidate"] = types.ModuleType("candidate")
    candidate.__file__ = str(path)
    exec(compile(source, path, "exec"), vars(candidate))
    model = candidate.train()
    if not isinstance(model, torch.nn.Module):
        raise Invalid(f"train() returned {type(model).__name__}, not a torch.nn.Module")
    model.eval()        # before the clock is read: what a model does here is part of its training
    synchronize()
    if clock.start is None:
        raise Invalid("train() returned without drawing a batch from prepare.batches()")
    train_seconds = seconds_now() - clock.start
    slack = budget + max(OVERTIME * budget, ONE_STEP) - train_seconds
    if not slack >= 0:
        raise Invalid(f"overtime: train() took {train_seconds:.1f} s of a budget of {budget:g} s: "
                      f"nothing may follow the last batch")
    clock.budget = 0.0      # no loop over batches() goes on from here
    tell("evaluation", limit=EVAL_LIMIT)
    unit = 1 if sys.platform == "darwin" else 1024      # bytes
    memory = (torch.cuda.max_memory_allocated() if CUDA else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if DEVICE == "mps":         # what Metal holds is not in it
        memory += torch.mps.driver_allocated_memory()
    if "torch._dynamo" in sys.modules:      # compiling for other shapes would take a minute
        torch.compiler.set_stance("force_eager")
    now = monotonic()
    bpb = evaluate(model, data, lengths, slack)
    return {"val_bpb": bpb["val"], "test_bpb": bpb["test"], "train_seconds": train_seconds,
            "startup_seconds": clock.startup, "eval_seconds": monotonic() - now,
            "total_seconds": monotonic() - BEGAN, "peak_memory_mb": memory / 1e6,
            "num_steps": clock.steps, "num_tokens": clock.seen,
            "num_params": sum(p.numel() for p in model.parameters())}


def one_run(path: Path, seed: int, budget: float, folder: Path, key: str | None) -> int:
    """Measure a train.py and return the exit code: 0 only after a report."""
    out = os.fdopen(os.dup(1), "w", buffering=1)    # not the sys.stdout that a candidate has

    def tell(event: str, **values):
        if key:
            out.write(f"\n{key} {json.dumps({'event': event, **values})}\n")

    if key:
        threading.Thread(target=end_with_driver, args=[os.dup(0)], daemon=True).start()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)    # a candidate's input() finds no more
    tell("setup", limit=SETUP_LIMIT, **conditions(folder, budget))
    try:
        report = measure(path, seed, budget, folder, tell)
        tell("report", **report)
        for name, value in report.items():
            if name != "test_bpb":      # no prompt may quote it from a log
                print(f"{name + ':':17} {round(value, 6)}", flush=True)
        return 0
    except Invalid as error:
        reason = str(error)[:2000]
    except BaseException as error:      # SystemExit from the candidate is no way out either
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:2000]
    tell("crash", reason=reason)
    print(f"autoresearch: this run is invalid: {reason}", file=sys.stderr, flush=True)
    return 1


# ---- 5  Documents: a source is a list of files, and a function that yields the documents of one --

SPLITS = "train", "val", "test"
PIECE = 20_000      # characters: a longer text is cut at line ends into documents of about this
SHORTEST = 64       # characters: a document with less than this is dropped
MANY_FILES = 50     # from so many files on, a file is whole in one split
PATIENCE = 8        # seconds: the longest pause between requests that bring nothing: 1, 2, 4, 8


def text_pieces(path: Path, errors: str = "replace") -> Iterator[str]:
    """Yield the documents of a text file: what <|endoftext|> separates, in pieces where long."""
    rest = ""
    with path.open(encoding="utf-8", errors=errors, newline="") as file:
        while chunk := file.read(PIECE) + file.readline(PIECE):     # up to the end of a line
            *whole, rest = (rest + chunk).split("<|endoftext|>")
            yield from whole
            if len(rest) >= PIECE:
                yield rest
                rest = ""
    yield rest


def json_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a gzip file of JSON lines, as C4 comes: {"text": ..., ...}"""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    except Exception as error:
        raise OSError(f"{path} is corrupt ({error}): delete it, to fetch it again") from error


def is_text(path: Path) -> bool:
    try:
        return sum(map(len, text_pieces(path, "strict"))) > 0
    except (UnicodeDecodeError, OSError):
        return False


def download(address: str) -> Path:
    """Fetch a file of the hub, unless it is there; go on where an earlier try stopped."""
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/datasets/{address}"
    path = CACHE / "downloads" / url.rpartition("/")[2]
    part, pause = path.with_name(f"{path.name}.part"), 0.5
    while not path.exists():
        part.touch()
        have = part.stat().st_size
        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        try:
            with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
                if answer.status_code != 416:       # else nothing is left to fetch
                    answer.raise_for_status()
                    print(f"{url}: fetching from byte {have} on", flush=True)
                    # Any answer but 206 ignores Range and brings all of the file.
                    with part.open("ab" if answer.status_code == 206 else "wb") as file:
                        file.writelines(answer.iter_content(1 << 16))   # raises if less comes
            if not part.stat().st_size:
                raise requests.ConnectionError("nothing came")
            part.replace(path)
        except requests.RequestException as error:
            pause = 1.0 if part.stat().st_size > have else 2 * pause
            if pause > PATIENCE or getattr(error.response, "status_code", 0) in (401, 403, 404):
                raise
            print(f"{path.name}: {error}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)
    return path


def source(data: str) -> tuple[str, list[Path], Callable[[Path], Iterator[str]]]:
    """Return (name, files, what yields the documents of a file), and download what is missing."""
    if data == "tinystories":
        stories = "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"
        return data, [download(stories)], text_pieces
    c4 = re.fullmatch(r"c4(?::(\d+))?", data)
    if c4 and 1 <= (shards := int(c4[1] or 4)) <= 1024:
        shard = "allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"
        return f"c4-{shards}", [download(shard.format(i)) for i in range(shards)], json_texts
    if data == "stdlib":
        name, path = data, Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test",     # not everywhere
                "encodings", "pydoc_data"}      # tables, each almost a copy of the next
        files = [f for f in path.rglob("*.py") if not skip & {*f.relative_to(path).parts}]
    elif (path := Path(data).expanduser()).exists():
        name = re.sub(r"\W+", "-", path.resolve().name)[:40]
        files = [f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path)}"]   # not hidden
        files = [f for f in files or [path] if f.is_file()]     # rglob of a file finds nothing
    else:
        sys.exit(f"prepare.py: --data {data}: give stdlib, tinystories, c4, c4:N with N from 1 to "
                 f"1024 shards, or a file or folder that exists")
    good = [f for f in sorted(files) if is_text(f)]
    if len(good) < len(files):
        print(f"{name}: skipped {len(files) - len(good)} of {len(files)} files, not UTF-8 or empty")
    return f"{name}-{sha256(good)[:8]}", good, text_pieces


def documents(files: list[Path], reader: Callable, share: float) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of each document, always in the same order; share: of val, of test."""
    seen, size = set(), dict.fromkeys(SPLITS, 0)
    shares = {"train": 1 - 2 * share, "val": share, "test": share}
    together = reader is text_pieces and len(files) >= MANY_FILES   # parts of one are alike
    for file in files:
        split = ""
        for text in reader(file):
            if len(text.strip()) < SHORTEST or hash(text) in seen:
                continue
            seen.add(hash(text))    # all that stays in memory: 100 bytes a document
            # The split that is furthest behind: val and test come from all over the text.
            if not (split and together):    # once a file, or once a document
                split = min(SPLITS, key=lambda s: size[s] / shares[s])
            size[split] += len(text)
            yield split, text


# ---- 6  Tokenizer: byte-pair encoding (Sennrich et al. 2016, arxiv.org/abs/1508.07909) over words

# Every character falls into exactly one word, as in GPT-2. A letter keeps its marks: \w lacks them,
# and the vowels of Hindi and Thai are marks. Words are bounded, so that encoding stays linear.
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
WORD = rf" ?(?:[^\W\d][{MARKS}]{{0,4}}){{1,32}}|\d{{1,3}}| ?[^\s\w]{{1,16}}|\s{{1,64}}(?!\S)|\s"
SAMPLE = 64_000_000     # characters of training text that the merges are learned from
COMMON = 200_000        # words among them that count; the others are too rare to win a merge
KNOWN = 500_000         # words whose tokens a process remembers: some 100 MB


def join(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Return `word` with `token` in the place of each `pair`, from the left."""
    joined = [-1]
    for this in word:
        if (joined[-1], this) == pair:
            joined[-1] = token
        else:
            joined.append(this)
    return joined[1:]


class Tokenizer:
    """Text to tokens and back: 0..255 are bytes, 256 + i is `merges[i]`, the last is END.

    >>> Tokenizer([(104, 105)]).encode("hi, hi")
    [256, 44, 32, 256]
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {tuple(pair): 256 + i for i, pair in enumerate(merges)}     # pair -> its token
        self.bytes = [bytes([i]) for i in range(256)]   # of each token, perhaps half a character
        for left, right in self.rank:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.bytes += [b""] * (VOCAB_SIZE - len(self.bytes))        # END, and what is not in use
        self.lengths = np.array([len(data) for data in self.bytes])
        self.known = functools.lru_cache(KNOWN)(self.merge)     # words repeat: merge each only once

    def encode(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self.known, re.findall(WORD, text))))

    def merge(self, word: str) -> list[int]:
        """Return the tokens of a word: of the pairs in it, the earliest learned is joined first."""
        tokens = list(word.encode("utf-8", "surrogatepass"))
        while known := self.rank.keys() & set(itertools.pairwise(tokens)):
            pair = min(known, key=self.rank.get)
            tokens = join(tokens, pair, self.rank[pair])
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; what is not UTF-8 in it becomes replacement characters."""
        return b"".join(self.bytes[token] for token in tokens).decode("utf-8", "replace")


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[int, int]]:
    """Return at most `count` merges: again and again the most frequent pair of neighbours."""
    counter, characters = collections.Counter(), 0
    for text in texts:
        counter.update(re.findall(WORD, text))
        characters += len(text)
        if characters > SAMPLE:
            break
    common = counter.most_common(COMMON)        # each word is held once, with its count
    words = [list(word.encode("utf-8", "surrogatepass")) for word, _ in common]
    counts = collections.Counter()              # pair -> how often it occurs
    where = collections.defaultdict(set)        # pair -> words that have it, or had it once
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            counts[pair] += common[i][1]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]       # the most frequent comes out first
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < count:
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:           # other merges have used some of them up since
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -negative < 2:
            break
        token, fresh = 256 + len(merges), set()
        merges.append(pair)
        for i in where.pop(pair):               # only words with the pair change
            for old in itertools.pairwise(words[i]):
                counts[old] -= common[i][1]
            words[i] = join(words[i], pair, token)
            for new in itertools.pairwise(words[i]):
                counts[new] += common[i][1]
                if token in new:
                    where[new].add(i)
                    fresh.add(new)
        for new in fresh:
            heapq.heappush(heap, (-counts[new], new))
    return merges


# ---- 7  Tokens: the documents of each split as one flat file of uint16 ---------------------------

def start_worker(merges: list[tuple[int, int]]):
    global _tokenizer
    _tokenizer = Tokenizer(merges)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process


def encode_document(document: tuple[str, str]) -> tuple[str, int, bytes]:
    """Return (split, bytes of text, its tokens as uint16)."""
    split, text = document
    tokens = [*_tokenizer.encode(text), END]
    return split, len(text.encode("utf-8", "surrogatepass")), np.array(tokens, np.uint16).tobytes()


def make(folder: Path, name: str, files: list[Path], reader: Callable):
    """Fill `folder`: tokenizer.json, {train,val,test}.bin and meta.json."""
    # A GPU needs more tokens for its longer windows; 7.9 MB of Python sources have to be enough.
    small = sum(file.stat().st_size for file in files) < 100e6
    share = (0.08 if CUDA else 0.06) if small else 0.01
    print(f"{name}: training a tokenizer of {VOCAB_SIZE} tokens, then encoding", flush=True)
    texts = (text for split, text in documents(files, reader, share) if split == "train")
    merges = learn_merges(texts, VOCAB_SIZE - 257)
    (folder / "tokenizer.json").write_text(json.dumps(merges))
    bins = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
    count = size = 0
    with multiprocessing.Pool(torch.get_num_threads(), start_worker, [merges]) as pool:
        # In order; the pipe to the workers keeps imap from reading far ahead.
        for split, length, data in pool.imap(encode_document, documents(files, reader, share), 50):
            bins[split].write(data)
            count, size = count + 1, size + length
    tokens = {split: file.tell() // 2 for split, file in bins.items()}
    for file in bins.values():
        file.close()
    need = MIN_WINDOWS * SEQ_LEN + 1        # tokens in each of val and test
    if min(tokens["val"], tokens["test"]) < need:       # of 5 bytes at most, on average
        sys.exit(f"prepare.py: too little text in {name}: a score needs about "
                 f"{5 * need / share / 1e6:.1f} MB")
    bytes_per_token = round(size / (sum(tokens.values()) - count), 4)       # END has no bytes
    print(f"{name}: {count} documents, {size / 1e6:.1f} MB, {bytes_per_token} bytes per token")
    (folder / "meta.json").write_text(json.dumps({
        "name": name, "documents": count, "bytes_per_token": bytes_per_token,
        "train_tokens": tokens["train"], "sha256": sha256([folder / f"{s}.bin" for s in SPLITS])}))


def prepare(data: str) -> Path:
    """Make `data` ready, unless it is, and return its folder."""
    (CACHE / "downloads").mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)    # one process at a time, until the file is closed
        except OSError as error:                # as on some network file systems
            print(f"WARNING: no lock on {CACHE} ({error}): start one at a time", file=sys.stderr)
        name, files, reader = source(data)
        folder = CACHE / f"{name}-v{VOCAB_SIZE}"
        half = CACHE / f"{folder.name}.part"
        if not folder.exists():
            shutil.rmtree(half, ignore_errors=True)     # of a process that was stopped
            half.mkdir()
            make(half, name, files, reader)
            os.sync()                           # first on the disk, then under its name
            half.rename(folder)                 # all of it is there, or none
        (CACHE / "current").write_text(folder.name)
    return folder


def ready(data: str | None) -> Path:
    """Return the folder of `data`; without it of what was prepared last, or of the default data."""
    try:
        last = CACHE / "current"
        if not data and last.exists() and (CACHE / last.read_text() / "meta.json").exists():
            return CACHE / last.read_text()
        return prepare(data or DEFAULT_DATA)
    except requests.RequestException as error:
        problem = f"{data or DEFAULT_DATA} cannot be downloaded ({error})"
        if data:
            sys.exit(f"prepare.py: --data {problem}: check the network or give --data stdlib")
        print(f"WARNING: {problem}: going on with stdlib, on a GPU a smoke test. When there is a "
              f"network: python prepare.py --data {DEFAULT_DATA}", file=sys.stderr)
        return ready("stdlib")
    except OSError as error:        # a full disk, a corrupt shard
        sys.exit(f"prepare.py: {error.strerror or error}; AUTORESEARCH_CACHE can replace {CACHE}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command goes on where it was")


# ---- 8  Command line -----------------------------------------------------------------------------

def by_hand(path: str):
    """Run the train.py at `path` as the driver would, in a process of its own."""
    os.execv(sys.executable, [sys.executable, __file__, "--run", path])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", help="stdlib, tinystories, c4[:SHARDS], or a file or folder of text")
    add("--run", metavar="TRAIN_PY", type=Path, help="train and measure this file once")
    add("--seed", type=int, default=0, help="with --run")
    add("--budget", type=float, default=BUDGET, help="with --run: training seconds (%(default)s)")
    add("--folder", type=Path, help="with --run: a prepared folder, instead of the last one")
    add("--key", help="with --run: begin lines for the driver with this")
    add("--devices", action="store_true", help="print names for CUDA_VISIBLE_DEVICES, and end")
    args = parser.parse_args()
    sys.argv[1:] = sys.orig_argv[1:] = []
    if args.devices:        # CUDA ignores names from the first that it does not know
        count = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return print(",".join(names.split(",")[:count]))
    check_card()
    if args.run and not args.run.exists():
        sys.exit(f"prepare.py: --run {args.run}: no such file")
    folder = args.folder or ready(args.data)
    if args.run:
        raise SystemExit(one_run(args.run.resolve(), args.seed, args.budget, folder, args.key))
    print(folder)       # the last line, for whoever called


if __name__ == "__main__":
    main()
