"""The ground that stands still: data, tokenizer, batches, the clock and the metric.

    python prepare.py                     # prepare the default data: c4 with CUDA, stdlib without
    python prepare.py --data stdlib       # the Python sources of every installation; no network
    python prepare.py --data tinystories  # children's stories, 2.2 GB
    python prepare.py --data c4:8         # eight shards of web text, 0.8 GB of text each
    python prepare.py --data my/texts     # a file or a folder of UTF-8 text of your own
    python prepare.py --devices           # names of the GPUs, for CUDA_VISIBLE_DEVICES

Nobody edits this file during research, so two scores can be compared. It does not cover code that
attacks the machine: a train.py runs with your rights. README.md shows the line for a sandbox.
"""
# ruff: noqa: E402  (what has to be done before torch is imported stands before it)

import argparse
import ast
import collections
import copy
import errno
import functools
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
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
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic, thread_time  # bound, as cross_entropy is, before a candidate runs
from typing import IO, NoReturn

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

# --------------------------------------------------------------------------------------------------
# 1  Scale: what the machine has decides between two settings of the same constants

DEVICE = ("cuda" if torch.cuda.is_available() else
          "mps" if torch.backends.mps.is_available() else "cpu")
CUDA = DEVICE == "cuda"
SEQ_LEN = 2048 if CUDA else 256        # tokens in a window of evaluation, by default of training
VOCAB_SIZE = 8192 if CUDA else 2048    # tokens: 256 bytes, the merges, one that ends a document
BUDGET = 300 if CUDA else 60           # seconds of training in a run
DEFAULT_DATA = "c4" if CUDA else "stdlib"

EVAL_ROWS = 16 if CUDA else 8           # windows in a batch of evaluation
EVAL_WINDOWS = 512 if CUDA else 256     # windows evaluated in each of val and test, or all there is
MIN_WINDOWS = 64           # below this a score would say little
OVERTIME = 0.02            # share of the budget for work after the last batch, such as averaging
                           # weights; 2% more training is worth about 0.002 bpb, less than the noise
ONE_STEP = 0.1 if DEVICE == "cpu" else 1.0      # seconds of it that a short budget has all the same
SETUP_LIMIT = 2 * BUDGET   # wall-clock seconds for start and compilation, before the first batch
EVAL_LIMIT = 180 if CUDA else 300               # wall-clock seconds for evaluation

END = VOCAB_SIZE - 1       # the token that ends a document; it stands for no bytes
LN2 = math.log(2)          # nats in a bit
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def fail(message: str) -> NoReturn:
    """End with one line and exit code 1: a person's mistake or the world's, not a bug."""
    raise SystemExit(f"prepare.py: {message}")


def sha256(paths: list[Path]) -> str:
    """Return one fingerprint of the contents of files, none of them empty."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(np.memmap(path, mode="r"))    # never in memory as a whole
        digest.update(b"\xff")      # where a file ends; UTF-8 never has this byte
    return digest.hexdigest()


def devices() -> list[str]:
    """Return a name for CUDA_VISIBLE_DEVICES for each CUDA device that torch sees."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else visible.split(",")
    return list(names)[:count]      # CUDA ignores names from the first that it does not know


def check_card():
    """End if torch cannot compute on the GPU; warn if it sees none where one is."""
    if CUDA:
        try:
            torch.ones(1, device="cuda").item()     # the smallest of kernels
        except RuntimeError as error:
            card = torch.cuda.get_device_capability()
            fail(f"the GPU has capability {card}, torch {torch.__version__} is built for "
                 f"{torch.cuda.get_arch_list()} ({str(error).splitlines()[0]}): install a torch "
                 f"built for it, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU")
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ       # on purpose
    if DEVICE == "cpu" and not hidden and shutil.which("nvidia-smi"):
        print(f"WARNING: all of this runs on the CPU, since torch {torch.__version__} (CUDA: "
              f"{torch.version.cuda}) cannot use the NVIDIA GPU. nvidia-smi says which CUDA the "
              f"driver supports: install a torch for that, or a newer driver", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# 2  Documents: a source is a list of files, and a function that yields the documents of one

SPLITS = "train", "val", "test"
PIECE = 20_000      # characters: a longer text is cut at line ends into documents of about this
SHORTEST = 64       # characters: a document with less than this is dropped
MANY_FILES = 50     # from so many files on, a file is whole in one split
TRIES = 5           # downloads that bring nothing, in a row, until one gives up: 8 to 15 seconds


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the documents of a text file: what <|endoftext|> separates, in pieces where long."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
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
    except (EOFError, KeyError, TypeError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        path.unlink()
        raise gzip.BadGzipFile(f"{path} was corrupt ({error}) and is deleted") from error


def is_text(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return sum(map(len, iter(functools.partial(file.read, 1 << 20), ""))) > 0
    except (UnicodeDecodeError, OSError):
        return False


def download(url: str, path: Path) -> Path:
    """Fetch `url` to `path`, unless it is there; go on where an earlier try stopped."""
    part, failures = path.with_name(path.name + ".part"), 0
    while not path.exists():
        before = have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        try:
            with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
                if answer.status_code != 416:       # else nothing is left to fetch
                    answer.raise_for_status()
                    if answer.status_code != 206:   # the server ignores Range and sends all of it
                        have = 0
                    total = have + int(answer.headers.get("Content-Length", 0))
                    print(f"{path.name}: {have / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
                    with part.open("ab" if have else "wb") as file:
                        for chunk in answer.iter_content(1 << 16):
                            have += file.write(chunk)
                    if have < total or not have:    # not every version of requests raises
                        raise requests.ConnectionError(f"{have} of {total} bytes came")
            part.replace(path)
        except requests.RequestException as error:
            failures = 1 if have > before else failures + 1     # in a row, without a byte
            if failures == TRIES or getattr(error.response, "status_code", 0) in (401, 403, 404):
                raise
            pause = 2 ** (failures - 1) * random.uniform(0.5, 1)
            print(f"{path.name}: {error}; again in {pause:.1f} s", file=sys.stderr)
            time.sleep(pause)
    return path


def source(data: str) -> tuple[str, list[Path], Callable[[Path], Iterator[str]]]:
    """Return (name, files, what yields the documents of a file), and download what is missing."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    path, folder = Path(data).expanduser(), CACHE / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    if data == "tinystories":
        name = "TinyStoriesV2-GPT4-train.txt"
        url = f"{hub}/datasets/roneneldan/TinyStories/resolve/main/{name}"
        return data, [download(url, folder / name)], text_pieces
    c4 = re.fullmatch(r"c4(?::(\d+))?", data)
    if c4 and 1 <= (shards := int(c4[1] or 4)) <= 1024:
        names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)]
        url = f"{hub}/datasets/allenai/c4/resolve/main/en"
        return f"c4-{shards}", [download(f"{url}/{n}", folder / n) for n in names], json_texts
    if data == "stdlib":
        name, path = data, Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test",     # not everywhere
                "encodings", "pydoc_data"}      # tables, each almost a copy of the next
        files = [f for f in path.rglob("*.py") if not skip & {*f.relative_to(path).parts}]
    elif path.exists():
        name = re.sub(r"\W+", "-", path.resolve().name)[:40]
        files = [f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path)}"]   # not hidden
        files = [f for f in files or [path] if f.is_file()]
    else:
        fail(f"--data {data}: give stdlib, tinystories, c4, c4:N with N from 1 to 1024 shards, or "
             f"a file or folder that exists")
    good = [f for f in sorted(files) if is_text(f)]
    if not good:
        fail(f"no text in {data}: --data PATH takes a file or a folder of UTF-8 text")
    if len(good) < len(files):
        print(f"{name}: skipped {len(files) - len(good)} of {len(files)} files: empty, not UTF-8, "
              f"or unreadable")
    return f"{name}-{sha256(good)[:8]}", good, text_pieces


def documents(files: list[Path], reader: Callable, share: float) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of each document, always in the same order; share: of val, and of test.

    A document goes to the split that is furthest behind its share, so that val and test come from
    all over the text. Near-empty documents and exact duplicates are dropped.
    """
    seen, size = set(), dict.fromkeys(SPLITS, 0)
    shares = {"train": 1 - 2 * share, "val": share, "test": share}
    together = reader is text_pieces and len(files) >= MANY_FILES   # since a file repeats itself
    for file in files:
        split = ""
        for text in reader(file):
            # All that stays in memory: 100 bytes a document, some 35 MB for a shard of C4.
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if len(text.strip()) < SHORTEST or key in seen:
                continue
            seen.add(key)
            if not (split and together):
                split = min(SPLITS, key=lambda s: size[s] / shares[s])
            size[split] += len(text)
            yield split, text


# --------------------------------------------------------------------------------------------------
# 3  Tokenizer: byte-pair encoding (Sennrich et al. 2016, arxiv.org/abs/1508.07909) over words

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
    """Text to tokens and back.

    A token 0..255 is that byte; token 256 + i is `merges[i]`, a pair of earlier tokens; END is the
    last. Each stands for exact bytes, also where it begins or ends inside a character.

    >>> Tokenizer([(104, 105)]).encode("hi, hi")
    [256, 44, 32, 256]
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {tuple(pair): 256 + i for i, pair in enumerate(merges)}     # -> their token
        self.bytes = [bytes([i]) for i in range(256)]       # token -> what it stands for
        for left, right in self.rank:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.bytes += [b""] * (VOCAB_SIZE - len(self.bytes))        # END, and what is not in use
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

    def lengths(self) -> np.ndarray:
        """Return the bytes of each token, (VOCAB_SIZE,) int64: 0 for END."""
        return np.array([len(data) for data in self.bytes], dtype=np.int64)


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


# --------------------------------------------------------------------------------------------------
# 4  Tokens: the documents of each split as one flat file of uint16

_tokenizer: Tokenizer       # of a worker process


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
    print(f"{name}: training a tokenizer of {VOCAB_SIZE} tokens", flush=True)
    texts = (text for split, text in documents(files, reader, share) if split == "train")
    merges = learn_merges(texts, VOCAB_SIZE - 257)
    (folder / "tokenizer.json").write_text(json.dumps(merges))
    print(f"{name}: encoding", flush=True)
    bins = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
    count = size = 0
    affinity = getattr(os, "sched_getaffinity", None)       # what we may use; unknown on a Mac
    with multiprocessing.Pool(affinity and len(affinity(0)), start_worker, [merges]) as pool:
        # In order; the pipe to the workers keeps imap from reading far ahead.
        stream = documents(files, reader, share)
        for split, length, tokens in pool.imap(encode_document, stream, chunksize=50):
            bins[split].write(tokens)
            count, size = count + 1, size + length
    tokens = {split: file.tell() // 2 for split, file in bins.items()}
    for file in bins.values():
        file.close()
    bytes_per_token = size / max(1, sum(tokens.values()) - count)       # END has no bytes
    need = MIN_WINDOWS * SEQ_LEN + 1        # tokens in each of val and test
    if min(tokens["val"], tokens["test"]) < need:
        enough = 1.2 * need * (bytes_per_token or 3) / share
        fail(f"too little text in {name}: {size / 1e6:.2f} MB, and a score needs about "
             f"{enough / 1e6:.1f} MB: add text")
    (folder / "meta.json").write_text(json.dumps({
        "name": name, "documents": count, "text_mb": round(size / 1e6, 3),
        "bytes_per_token": round(bytes_per_token, 4), "train_tokens": tokens["train"],
        "sha256": sha256([folder / f"{split}.bin" for split in SPLITS])}))


def lock(file: IO):
    """Wait until no other process has `file` locked. It is ours until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"WARNING: {file.name}: {error.strerror}; two processes at once would disturb each "
              f"other", file=sys.stderr)      # as on some network file systems


def prepare(data: str) -> Path:
    """Make `data` ready, unless it is, and return its folder."""
    start = time.monotonic()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        lock(file)
        name, files, reader = source(data)
        folder = CACHE / f"{name}-v{VOCAB_SIZE}"
        half, current = CACHE / f"{folder.name}.part", CACHE / "current.part"
        if not (folder / "meta.json").exists():
            for rest in half, folder:       # of a process that was stopped
                shutil.rmtree(rest, ignore_errors=True)
            half.mkdir()
            make(half, name, files, reader)
            os.sync()                       # first on the disk, then under its name
            half.rename(folder)             # all of it is there, or none
        current.write_text(folder.name)
        current.replace(CACHE / "current")
    meta = json.loads((folder / "meta.json").read_text())
    print(f"{name}: {meta['text_mb']} MB in {meta['documents']} documents, "
          f"{meta['train_tokens'] / 1e6:.2f}M tokens to train on, {meta['bytes_per_token']} bytes "
          f"per token; ready in {time.monotonic() - start:.1f} s", flush=True)
    return folder


def prepare_or_fall_back(data: str | None) -> Path:
    """Prepare `data`. The default data that cannot be reached is replaced by stdlib, loudly."""
    try:
        return prepare(data or DEFAULT_DATA)
    except requests.RequestException as error:
        if data:
            fail(f"--data {data} cannot be downloaded ({error}): check the network and try "
                 f"again, or give --data stdlib or a folder of text")
        print(f"WARNING: {DEFAULT_DATA} cannot be downloaded ({error}). Going on with the Python "
              f"sources (stdlib): scores will be of code, not of web text"
              f"{', and a GPU reads all of it 160 times in 300 s: a smoke test' * CUDA}. When "
              f"there is a network: python prepare.py --data {DEFAULT_DATA}", file=sys.stderr)
        return prepare_or_fall_back("stdlib")
    except gzip.BadGzipFile as error:
        fail(f"{error}: the same command fetches it again")
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or CACHE}; AUTORESEARCH_CACHE names "
             f"another place for data")


# --------------------------------------------------------------------------------------------------
# 5  The clock: it starts with the first batch and ends the loop over batches() at the budget

# On a CPU, the CPU time of the thread that calls train(): another program then decides no verdict.
seconds_now = thread_time if DEVICE == "cpu" else monotonic


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


_clock: Clock           # of the run in this process


def synchronize():
    """Wait until the device has done what it was told; a CPU has."""
    if DEVICE != "cpu":
        torch.accelerator.synchronize()


GOLDEN_RATIO = (1 + 5 ** 0.5) / 2   # its multiples, modulo 1, are spread most evenly (Weyl)


def _windows(tokens: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of length + 1 tokens forever. Each epoch has all of them, at a new offset."""
    # Five windows come in the order 0, 2, 4, 1, 3: wherever a run ends, it has seen all parts of
    # the text alike. Scores of equal steps scatter by 0.0025 bpb so, and by 0.006 if shuffled.
    while True:
        offset = rng.integers(length)
        count = (len(tokens) - 1 - offset) // length
        for i in np.argsort((np.arange(count) * GOLDEN_RATIO + rng.random()) % 1):
            yield tokens[offset + i * length:offset + (i + 1) * length + 1]


def batches(batch_size: int, seq_len: int = SEQ_LEN
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield (x, y, progress) until the budget is spent.

    x, y: int64 (batch_size, seq_len) on DEVICE; y[i, t] is the token after x[i, t]. progress: the
    share of the budget that is spent, in [0, 1), to drive schedules with. The first batch starts
    the clock, and nothing sets it back: a second loop goes on with the time that is left.
    Raises ValueError when there are no windows of seq_len + 1 tokens.
    """
    clock, windows = _clock, _windows(_clock.tokens, seq_len, _clock.rng)
    if not 0 < seq_len < len(clock.tokens) // 2:
        raise ValueError(f"seq_len {seq_len}: there are {len(clock.tokens)} tokens to train on")
    queued = collections.deque()        # CUDA events, one after each step that the GPU may be at
    last, reported = math.inf, -math.inf    # times of the last batch, of the last progress event
    while True:
        if threading.get_ident() != clock.thread:
            raise RuntimeError("batches() belongs to the thread that calls train()")
        batch = np.stack(list(itertools.islice(windows, batch_size))).astype(np.int64)
        pinned = torch.from_numpy(batch).pin_memory() if CUDA else torch.from_numpy(batch)
        batch = pinned.to(DEVICE, non_blocking=True)
        if CUDA and clock.steps > 1:    # one step ahead of the GPU, never two: it never waits
            queued.append(torch.cuda.Event())
            queued[-1].record()
            if len(queued) > 1:
                queued.popleft().synchronize()
        else:                           # the first step is timed to its end, before a second
            synchronize()
        if clock.start is None:
            cap = 4 * clock.budget if DEVICE == "cpu" else clock.budget * (1 + OVERTIME)
            clock.tell("training", limit=cap + 10)      # 4: a CPU may have other load
            clock.startup, clock.start = monotonic() - BEGAN, seconds_now()
        now = seconds_now() - clock.start
        step, last = max(0.0, now - last), now          # 0 at the first
        # No batch without the time that the last one took. A GPU is still at the last one.
        if now + step * (2 if CUDA else 1) >= clock.budget:
            break
        if now - reported >= 1:
            reported = now
            clock.tell("progress", share=now / clock.budget,
                       tokens_per_second=clock.seen / max(now, 1e-3))
        clock.steps += 1
        clock.seen += batch_size * seq_len
        yield batch[:, :-1], batch[:, 1:], now / clock.budget


# --------------------------------------------------------------------------------------------------
# 6  The metric: bits per byte of held-out text, and the probes that make it worth believing


def bits_per_byte(nats: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Return the bits that a model needs for a byte of text: sum of -log2 p / sum of bytes.

    nats: -ln p of each token, given those before it. lengths[token]: how many bytes it stands for.
    """
    sizes = lengths[tokens]
    bits = nats[sizes > 0] / LN2        # END has no bytes, so it does not count
    return float(bits.sum() / sizes.sum())


class Invalid(Exception):
    """A run whose score would mean nothing. The text says why."""


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    """Return the logits of a batch: int64 (B, T) -> float32 (B, T, VOCAB_SIZE) on DEVICE.

    Nothing else is asked of a candidate. A judge in a process of its own would begin here.
    """
    logits = model(torch.from_numpy(tokens).to(DEVICE, copy=True))      # it may write into its copy
    if type(logits) is not torch.Tensor:
        raise Invalid(f"the model returns {type(logits).__name__}, not a plain tensor of logits")
    if logits.shape != (*tokens.shape, VOCAB_SIZE) or not logits.is_floating_point():
        raise Invalid(f"the model returns {logits.dtype} {tuple(logits.shape)}, not floating-point "
                      f"logits {(*tokens.shape, VOCAB_SIZE)}")
    return logits.float()


def token_nats(model: torch.nn.Module, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
               ) -> np.ndarray:
    """Return -ln p(y[i, t]) given x[i, :t+1]: two int64 (B, T) -> float32 (B, T)."""
    torch.manual_seed(int(rng.integers(2 ** 63)))   # torch's random state remembers no call
    logits = logits_of(model, x)
    targets = torch.from_numpy(y).flatten().to(DEVICE)
    nats = cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(y.shape).cpu()
    if not nats.isfinite().all():       # of the nats: -inf for a token that never comes is fair
        raise Invalid("logits that are not finite, or not so as float32")
    i, t = (int(rng.integers(size)) for size in x.shape)    # a token by hand: is torch still torch?
    row, top = logits[i, t].tolist(), logits[i, t].max().item()
    nat = math.log(sum(math.exp(logit - top) for logit in row)) + top - row[y[i, t]]
    if not math.isclose(nat, nats[i, t], rel_tol=1e-4, abs_tol=1e-3):  # float32: 1e-6
        raise Invalid("torch no longer computes cross_entropy: something has replaced part of it")
    return nats.numpy()


# A probe asks about a row of a batch again, and lets it go on differently from a cut on:
#
#     row      the  cat  sat  on      the  mat
#     other    in   may  it   rained  all  day     a row of another batch
#     probe    the  cat  sat  rained  all  day     cut = 3
#
# The first 3 predictions, of "cat", "sat" and "on", had the same tokens to go by, and may not
# change. A model that sees one token ahead loses at the third what it gained there. The rows of a
# probe also change places, so that each has other neighbours.


def choose_cuts(probes: int, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return where each row of each probe is cut: (probes, rows), in 1 ... length.

    Half of them are spread over all places. Half are at ends of chunks of 2, 4, 8, ... tokens, each
    size equally often, since accidents happen there. One row a probe is whole: cut at its end.
    """
    count = probes * (rows - 1)
    anywhere = np.resize(1 + rng.permutation(length - 1), count // 2)
    chunk = 2 ** rng.integers(1, length.bit_length() - 1, count - count // 2)
    ends = chunk * rng.integers(1, length // chunk)
    cuts = rng.permutation([*anywhere, *ends]).reshape(probes, rows - 1)
    return rng.permuted(np.insert(cuts, 0, length, axis=1), axis=1)


# What changes where nothing may is rounding: nothing on most CPUs; with experts or atomics, a bf16
# logit of 4, in steps of 1/32, is off by 0.01, and by 1 in a few tokens that are routed elsewhere.
# Rounding has no direction and no place. What is gained by seeing too much has both.
BIAS = 0.002        # nats: how far from 0 a mean may be; 0.001 bpb, far below the noise of seeds
SIGMAS = 6          # standard errors on top of it: rounding gets there in one of 10^8 runs
SPREAD = 0.02       # nats, the mean size everywhere, the median at the cuts: twice that of bf16
LARGEST = 1.0       # nats, what one token counts at most in a mean: a few near-ties are no leak
GATHERED = 2, 4     # of the 3, 16 largest changes so many may be at cuts: more is no chance


def refuse_leaks(change: np.ndarray, cuts: np.ndarray, later: np.ndarray):
    """Raise Invalid if predictions changed by more than rounding.

    change: (P, B, T) nats that P batches lost when probed. cuts: (P, B) of their rows. later: (P,),
    whether the model had answered more calls at the probe than at the batch.
    """
    left = cuts[..., None] - np.arange(change.shape[-1])    # predictions that have to stay, from t
    stays, sign = left > 0, np.where(later, 1, -1)[:, None, None]
    small = change.clip(-LARGEST, LARGEST)
    kept, at_cut, learned = small[stays], small[left == 1], (small * sign)[stays]
    sigma = np.sqrt(np.square(kept).mean())
    unbiased = all(np.abs(some.mean()) <= BIAS + SIGMAS * sigma / len(some) ** 0.5
                   for some in (kept, at_cut, learned))
    spread = max(np.abs(kept).mean(), np.median(np.abs(at_cut)))
    largest = np.argsort(-change[stays])[:16]               # random noise would hide them in a mean
    hits = ((left[stays] == 1) & (change[stays] > SPREAD))[largest]
    gathered = hits[:3].sum() > GATHERED[0] or hits.sum() > GATHERED[1]
    if not (unbiased and spread <= SPREAD and not gathered):            # a NaN is refused
        mps = " (torch's attention in half precision leaks on MPS: pytorch issue 195910)"
        raise Invalid(
            f"leak: predictions change when only later tokens, other rows of the batch and earlier "
            f"calls change: by {at_cut.mean():+.4f} nats at the last token before the change (and "
            f"{hits.sum()} of the 16 largest changes), {kept.mean():+.4f} anywhere, {spread:.4f} "
            f"in size, {learned.mean():+.4f} from call to call; logits at t may depend on "
            f"tokens[:t+1] of their row alone; fp8 or int8 scaled by batch mixes rows"
            f"{mps * (DEVICE == 'mps')}")


def held_out(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first windows of a split and the tokens that follow: int64 (batches, B, T)."""
    count = min(EVAL_WINDOWS, (len(tokens) - 1) // SEQ_LEN) // EVAL_ROWS
    size, shape = count * EVAL_ROWS * SEQ_LEN, (count, EVAL_ROWS, SEQ_LEN)
    return tuple(tokens[i:i + size].astype(np.int64).reshape(shape) for i in (0, 1))


@torch.no_grad()
def evaluate(model: torch.nn.Module, splits: dict[str, np.ndarray], lengths: np.ndarray,
             slack: float = 1.0) -> dict[str, float]:
    """Return {split: bits per byte}. Raises Invalid if the model knows more than it may.

    splits: flat arrays of tokens. slack: seconds that its calls may take beyond the usual.
    """
    rng = np.random.default_rng()       # seeded by the system: no candidate knows it
    parts = [held_out(tokens) for tokens in splits.values()]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts))
    cuts, nats, probed = choose_cuts(*x.shape, rng), np.empty(x.shape), np.empty(x.shape)
    seconds = []                        # of each call

    def ask(model: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        start = seconds_now()
        answer = token_nats(model, x, y, rng)
        seconds.append(seconds_now() - start)
        return answer

    ask(model, rng.integers(VOCAB_SIZE, size=x[0].shape), y[0])     # some fold weights together now
    try:
        twin = copy.deepcopy(model)     # does not know what the model has answered
    except Exception:                   # something in it cannot be copied: probe it as it is
        twin = model
    order, probes = rng.permutation(len(x)), rng.permutation(len(x))
    for i, p in zip(order, probes):     # each batch is scored once and probed once
        nats[i] = ask(model, x[i], y[i])
        other = rng.permutation(x[p - rng.integers(1, len(x))])
        spliced = np.where(np.arange(SEQ_LEN) < cuts[p, :, None], x[p], other)
        rows = rng.permutation(len(spliced))
        probed[p, rows] = ask(twin, spliced[rows], y[p, rows])
    refuse_leaks(probed - nats, cuts, later=np.argsort(probes) >= np.argsort(order))
    usual = np.median(seconds)
    put_off = sum(max(0.0, took - 5 * usual) for took in seconds)
    if not put_off <= slack:
        raise Invalid(f"overtime: calls of the model took {put_off:.1f} s more than the usual "
                      f"{usual:.2f} s each: no work may be put off until evaluation")
    ends = np.cumsum([len(part) for part, _ in parts])[:-1]
    return {split: bits_per_byte(its_nats, its_y, lengths) for split, its_nats, its_y
            in zip(splits, np.split(nats, ends), np.split(y, ends))}


@torch.no_grad()
def sample(model: torch.nn.Module, folder: Path, count: int = 64) -> str:
    """Return how the model goes on with the beginning of val, drawn at temperature 0.8."""
    tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    tokens, given = np.full((1, SEQ_LEN), END), 24
    tokens[0, :given] = np.fromfile(folder / "val.bin", np.uint16, given)
    for at in range(given, given + count):  # always a whole window: what is behind cannot matter
        logits = logits_of(model, tokens)[0, at - 1]
        tokens[0, at] = torch.multinomial(torch.softmax(logits / 0.8, 0), 1).item()
    return tokenizer.decode(tokens[0, :given + count].tolist())


# --------------------------------------------------------------------------------------------------
# 7  One run: a fresh process, whose main is this file and never the candidate

# What is trusted: the candidate runs in the process that judges it, and knows a stub of this file
# with four names. What it puts in the place of prepare.batches it puts there for itself alone. The
# driver believes only lines that begin with the key of the run: it is on the command line, since
# that passes through every launcher, and gone from sys.argv before the candidate is executed. This
# stops a sloppy researcher and one that games the score. It does not stop malware.


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
    value, where = sys.modules[root], f"{root}."
    while parts and isinstance(value, types.ModuleType):
        where, value = f"{value.__name__}.{parts[0]}.", getattr(value, parts.pop(0), None)
        if is_module := isinstance(value, types.ModuleType):
            where = f"{value.__name__}."            # torch.importlib is importlib
        if is_module or where.count(".") > 2:       # torch.relu needs no permission
            if not any(there.startswith(where) or where.startswith(there) for there in is_open):
                return f"{where[:-1]} is closed to a candidate"
        if CLOSED.fullmatch(f"{root}.{getattr(value, '__name__', '')}"):
            return "no files, no seeds, no attributes by computed names"
    if is_set and not re.match(r"torch\.(backends|_\w+\.config)\.", where):
        return "only settings may be assigned"
    return "a module stands only before a dot" if isinstance(value, types.ModuleType) else ""


def refuse_modules(source: str) -> None:
    """Raise Invalid where a name leads to what is closed to a candidate, however it is called."""
    nodes, bound = list(ast.walk(ast.parse(source))), set()     # ("F", "torch.nn.functional"), ...
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "train.py", "exec"), {})   # loads submodules
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                if isinstance(node, ast.ImportFrom):
                    path = f"{node.module}.{alias.name}"
                bound.add((alias.asname or path.rpartition(".")[2], path))
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


def load_candidate(path: Path) -> types.ModuleType:
    """Import a train.py as the module `candidate`."""
    stub = types.ModuleType("prepare", "what a train.py may use of prepare.py")
    stub.DEVICE, stub.SEQ_LEN, stub.VOCAB_SIZE, stub.batches = DEVICE, SEQ_LEN, VOCAB_SIZE, batches
    sys.modules["prepare"] = sys.modules["__main__"] = stub
    refuse_modules(path.read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("candidate", path)
    module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def end_with_driver():
    """End this process and its children when the driver, which holds our stdin open, ends.

    A launcher that forwards no stdin brings no byte of the driver's. Its run is left alone.
    """
    pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)    # a candidate's input() finds no more

    def watch():
        if os.read(pipe, 1):                        # hello
            while os.read(pipe, 1024):              # b"" at the end
                pass
            os.kill(0, signal.SIGKILL)              # 0: all of the own process group
            os._exit(1)                             # SIGKILL spares the init of a container

    threading.Thread(target=watch, daemon=True).start()


def peak_memory_mb() -> float:
    """Return the most memory this process has held: of the GPU, or of the machine without one."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024      # bytes
    metal = torch.mps.driver_allocated_memory() if DEVICE == "mps" else 0
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + metal) / 1e6


def conditions(folder: Path, budget: float) -> dict:
    """Return what makes two scores comparable, and what a researcher should know of the machine."""
    meta, info = json.loads((folder / "meta.json").read_text()), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = f"{[*names, platform.processor()][0]}, {os.cpu_count()} cores"
    card = torch.cuda.get_device_name() if CUDA else ""
    return {"data": meta["name"], "sha256": meta["sha256"], "budget": budget, "seq_len": SEQ_LEN,
            "vocab_size": VOCAB_SIZE, "prepare": sha256([Path(__file__)])[:16],
            "device": card or DEVICE, "torch": torch.__version__,
            "threads": torch.get_num_threads() if DEVICE == "cpu" else 0, "processor": card or cpu,
            "bf16": (torch.cuda.is_bf16_supported(including_emulation=False) if CUDA else
                     DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported()),
            "train_tokens": meta["train_tokens"], "bytes_per_token": meta["bytes_per_token"]}


def measure(path: Path, seed: int, budget: float, folder: Path, tell: Callable) -> torch.nn.Module:
    """Train the train.py at `path` once and report. Raises Invalid, or what train() raises."""
    global _clock
    data = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in SPLITS}
    lengths = Tokenizer(json.loads((folder / "tokenizer.json").read_text())).lengths()
    clock = _clock = Clock(data.pop("train"), seed, budget, tell)
    for set_seed in torch.manual_seed, np.random.seed, random.seed:
        set_seed(seed)
    model = load_candidate(path).train()
    if not isinstance(model, torch.nn.Module):
        raise Invalid(f"train() returned {type(model).__name__}, not a torch.nn.Module")
    model.eval()        # before the clock is read: what a model does here is part of its training
    synchronize()
    if clock.start is None:
        raise Invalid("train() returned without drawing a batch from prepare.batches()")
    train_seconds = seconds_now() - clock.start
    slack = budget + max(OVERTIME * budget, ONE_STEP) - train_seconds
    if not slack >= 0:
        raise Invalid(f"overtime: train() returned {train_seconds:.1f} s after its first batch; "
                      f"the budget is {budget:g} s and nothing may follow the last batch")
    clock.budget = 0.0      # no loop over batches() goes on from here
    tell("evaluation", limit=EVAL_LIMIT)
    memory, now = peak_memory_mb(), monotonic()
    if "torch._dynamo" in sys.modules:      # compiling for other shapes would take a minute
        torch.compiler.set_stance("force_eager")
    bpb = evaluate(model, data, lengths, slack)
    report = {"val_bpb": bpb["val"], "test_bpb": bpb["test"], "train_seconds": train_seconds,
              "startup_seconds": clock.startup, "eval_seconds": monotonic() - now,
              "total_seconds": monotonic() - BEGAN, "peak_memory_mb": memory,
              "num_steps": clock.steps, "num_tokens": clock.seen,
              "num_params": sum(p.numel() for p in model.parameters())}
    tell("report", **report)
    for name, value in report.items():
        if name != "test_bpb":      # no prompt may quote it from a log
            print(f"{name + ':':17} {round(value, 6)}", flush=True)
    return model


def one_run(path: Path, seed: int, budget: float, folder: Path, key: str | None) -> int:
    """Measure a train.py and return the exit code: 0 only after a report."""
    out = os.fdopen(os.dup(1), "w", buffering=1)    # not the sys.stdout that a candidate has

    def tell(event: str, **values):
        if key:
            out.write(f"\n{key} {json.dumps({'event': event, **values})}\n")

    if key:
        end_with_driver()
    tell("setup", limit=SETUP_LIMIT, **conditions(folder, budget))
    try:
        model = measure(path, seed, budget, folder, tell)
        if not key:     # for a person; the driver's runs have no use for it
            print(f"sample:           {sample(model, folder)[:240]!r}")
        return 0
    except Invalid as error:
        reason = str(error)[:2000]
    except BaseException as error:      # SystemExit from the candidate is no way out either
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:2000]
    tell("crash", reason=reason)
    print(f"autoresearch: this run is invalid: {reason}", file=sys.stderr, flush=True)
    return 1


def prepared() -> Path:
    """Return the folder that was prepared last; prepare the default data where there is none."""
    current = CACHE / "current"
    folder = CACHE / current.read_text() if current.exists() else CACHE
    return folder if (folder / "meta.json").exists() else prepare_or_fall_back(None)


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
    if args.devices:
        return print(",".join(devices()))
    check_card()
    if args.run:
        if not args.run.exists():
            fail(f"--run {args.run}: no such file")
        folder = args.folder or prepared()
        raise SystemExit(one_run(args.run.resolve(), args.seed, args.budget, folder, args.key))
    try:
        print(prepare_or_fall_back(args.data))      # last: the folder, for whoever called
    except KeyboardInterrupt:
        fail("stopped; the same command goes on where it was")


if __name__ == "__main__":
    main()
