"""The ground that stands still: data, tokenizer, batches, the clock and the metric.

    python prepare.py                     # prepare the default data: c4 with CUDA, stdlib without
    python prepare.py --data stdlib       # the Python sources of every installation; no network
    python prepare.py --data tinystories  # children's stories, 2.2 GB
    python prepare.py --data c4:8         # eight shards of web text, 0.8 GB of text each
    python prepare.py --data my/texts     # a file or a folder of UTF-8 text of your own

Nobody edits this file during research: two numbers can be compared because of what stands here.

  1  Scale       the constants, in two settings
  2  Documents   text from files or over HTTP, cleaned, in a fixed order
  3  Tokenizer   byte-pair encoding, trained here
  4  Tokens      documents -> train.bin, val.bin, test.bin
  5  The clock   batches(): the only way to the training data, and the only budget
  6  The metric  bits per byte, and the probes that make it worth believing
  7  One run     import a train.py, train, probe, evaluate, report

What it does not cover: code that is written to attack the machine. A train.py runs with your
rights; README.md shows the line that puts it into a sandbox.
"""

import argparse
import collections
import contextlib
import fcntl
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
import random
import re
import resource
import signal
import sys
import sysconfig
import time
import traceback
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic  # like cross_entropy: bound before a candidate could replace it
from typing import NoReturn

# On a machine that has something else to do as well, threads that spin while they wait for each
# other made a run 15 times slower. Has to be set before torch is imported.
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
PROBE_SHARE = 1 / 8        # probes per batch of evaluation: 1 / 9 of its time
OVERTIME = 0.02, 1.0       # share of the budget + seconds, for work after the last batch such as
                           # averaging weights; 2% more training is worth about 0.002 bpb, less than
                           # the noise
SETUP_LIMIT = 300          # seconds for start and compilation, before the first batch
EVAL_LIMIT = 180           # seconds for evaluation

END = VOCAB_SIZE - 1       # the token that ends a document; it stands for no bytes
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def fail(message: str) -> NoReturn:
    """End with one line and exit code 1: a person's mistake or the world's, not a bug."""
    raise SystemExit(f"prepare.py: {message}")


def write_whole(path: Path, text: str):
    """Write a file under a temporary name and rename it: it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(paths: list[Path]) -> str:
    """Return one fingerprint of the contents of files, and of where each of them ends."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        digest.update(b"\xff")      # a byte that UTF-8 never has
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other processes out of it until the block, or this process, ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is at work in {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """One line of how far, how fast and how long still: redrawn in a terminal, else every 10 s."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.first = what, total, done
        self.start = self.said = time.monotonic()

    def __call__(self, done: int, last: bool = False):
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.said < (0.2 if terminal else 10) and not last:
            return
        self.said = now
        rate = (done - self.first) / max(now - self.start, 1e-3)
        left = max(self.total - done, 0) / max(rate, 1)
        line = (f"{self.what}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, {left:.0f} s left")
        print(f"\r{line}\033[K" if terminal else line, file=sys.stderr, flush=True,
              end="" if terminal and not last else "\n")


# --------------------------------------------------------------------------------------------------
# 2  Documents: a source is a list of files, and a function that yields the documents of one

SPLITS = "train", "val", "test"
PIECE = 20_000      # characters: a longer text is cut at line ends into documents of about this
MANY_FILES = 50     # from so many files on, a file is whole in one split
SHORTEST = 64       # characters: a document with less than this is dropped
C4_SHARDS = 4       # of the 1024 shards of C4, unless --data c4:N says otherwise
TRIES = 5           # downloads that bring nothing, in a row, until one gives up: 8 to 15 seconds


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the documents of a text file: what <|endoftext|> separates, in pieces where long."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while chunk := file.read(PIECE) + file.readline(PIECE):
            *whole, rest = (rest + chunk).split("<|endoftext|>")
            yield from whole
            if len(rest) >= PIECE:
                yield rest
                rest = ""
    yield rest


def json_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a gzip file of JSON lines, as C4 comes: {"text": ..., ...}

    Deletes it and raises gzip.BadGzipFile where it is anything else.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    except (EOFError, KeyError, TypeError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        path.unlink()
        raise gzip.BadGzipFile(f"{path} was corrupt ({error}) and is deleted") from error


def why_not_text(path: Path) -> str:
    """Return "" for a file of UTF-8 text, else what is wrong with it."""
    try:
        if not path.is_file():      # a pipe would never end
            return "unreadable"
        with path.open(encoding="utf-8") as file:
            some = file.read(1)
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError:
        return "unreadable"
    return "" if some else "empty"


def text_files(name: str, paths: list[Path]) -> tuple[str, list[Path], int]:
    """Keep what is text, say what is not. Returns (name with a fingerprint, files, bytes)."""
    why = {path: why_not_text(path) for path in paths}
    good = [path for path in paths if not why[path]]
    skipped = collections.Counter(filter(None, why.values()))
    if skipped:
        print(f"{name}: skipped {skipped.total()} of {len(paths)} files: "
              + ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())))
    if not good:
        fail(f"no text in {name}: --data PATH takes a file or a folder of UTF-8 text")
    return f"{name}-{sha256(good)[:8]}", good, sum(path.stat().st_size for path in good)


def files_in(folder: Path) -> list[Path]:
    """Return what is below a folder and not hidden: files, and folders that cannot be listed."""
    found: list[Path] = []
    walk = os.walk(folder, onerror=lambda error: found.append(Path(error.filename)))
    found += [Path(root, name) for root, _, names in walk for name in names]
    return sorted(path for path in found
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fetch(url: str, part: Path):
    """Add to `part` what it lacks of `url`. Raises requests.RequestException; what came is kept."""
    have = max(size_of(part) - 1, 0)
    with requests.get(url, stream=True, timeout=30, headers={
            "Range": f"bytes={have}-",      # the last byte once more, so that some is always left
            "Accept-Encoding": "identity"}) as answer:
        if answer.status_code == 416:       # shorter than what we have: it is another file now
            part.unlink(missing_ok=True)
        answer.raise_for_status()
        if answer.status_code != 206:       # the server sends all of it
            have = 0
        total = have + int(answer.headers.get("Content-Length", 0))
        progress = Progress(part.stem, total, have)
        with part.open("ab") as file:
            file.truncate(have)
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                have += len(chunk)
                progress(have)
            progress(have, last=True)
            file.flush()
            os.fsync(file.fileno())
    if have < total or not have:
        raise requests.ConnectionError(f"{url}: {have} of {total} bytes came")


def download(url: str, path: Path) -> Path:
    """Fetch `url` to `path`, unless it is there; go on where an earlier try or process stopped.

    Raises requests.RequestException when the server refuses or TRIES tries in a row bring nothing.
    """
    part, failures = path.with_name(path.name + ".part"), 0
    with locked(path.parent):
        while not path.exists():
            before = size_of(part)
            try:
                fetch(url, part)
                part.replace(path)
            except requests.RequestException as error:
                failures = 1 if size_of(part) > before else failures + 1
                refused = getattr(error.response, "status_code", 0) in (401, 403, 404)
                if refused or failures == TRIES:
                    raise
                pause = 2 ** (failures - 1) * random.uniform(0.5, 1)
                print(f"{path.name}: {error}; again in {pause:.1f} s", file=sys.stderr)
                time.sleep(pause)
    return path


def source(data: str) -> tuple[str, list[Path], int, Callable[[Path], Iterator[str]]]:
    """Find what `data` names, download what is missing of it.

    Returns (name, files, bytes of text, about; what yields the documents of a file).
    """
    hub, downloads = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", CACHE / "downloads"
    path, c4 = Path(data).expanduser(), re.fullmatch(r"c4(?::(\d+))?", data)
    shards = int(c4[1] or C4_SHARDS) if c4 else 0
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        other = {"site-packages", "dist-packages", "test", "tests", "idle_test",    # not everywhere
                 "encodings", "pydoc_data"}     # tables, each almost a copy of the next
        paths = [p for p in sorted(root.rglob("*.py")) if not other & {*p.relative_to(root).parts}]
        return *text_files(data, paths), text_pieces
    if data == "tinystories":
        name = "TinyStoriesV2-GPT4-train.txt"
        url = f"{hub}/datasets/roneneldan/TinyStories/resolve/main/{name}"
        file = download(url, downloads / name)
        return data, [file], file.stat().st_size, text_pieces
    if 1 <= shards <= 1024:
        names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)]
        url = f"{hub}/datasets/allenai/c4/resolve/main/en"
        files = [download(f"{url}/{name}", downloads / name) for name in names]
        size = int(2.4 * sum(file.stat().st_size for file in files))    # as C4 compresses
        return f"c4-{shards}", files, size, json_texts
    if path.exists():
        paths = files_in(path) if path.is_dir() else [path]
        return *text_files(re.sub(r"\W+", "-", path.resolve().name)[:40], paths), text_pieces
    fail(f"--data {data}: give stdlib, tinystories, c4, c4:N with N from 1 to 1024 shards, or a "
         f"file or folder that exists")


def documents(files: list[Path], reader: Callable, share: float) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for each document, always in the same order.

    Near-empty documents and exact duplicates are dropped. A document goes to the split that is
    furthest behind its share, so that val and test have the size they should have and come from all
    over the text; of a folder of many files the pieces of each stay together, since a file repeats
    itself. All that stays in memory is a hash of each document: 100 bytes in a Python set, some
    35 MB a shard of C4.
    """
    seen, size = set(), dict.fromkeys(SPLITS, 0)
    shares = {"train": 1 - 2 * share, "val": share, "test": share}
    together = reader is text_pieces and len(files) >= MANY_FILES
    for file in files:
        split = ""
        for text in reader(file):
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

# Every character falls into exactly one word, as in GPT-2. Lengths are bounded, so that no input
# makes encoding quadratic.
WORD = r" ?[^\W\d]{1,32}|\d{1,3}| ?[^\s\w]{1,16}|\s{1,64}(?!\S)|\s"
SAMPLE = 64_000_000     # characters of training text that the merges are learned from
COMMON = 200_000        # words among them that count; the others are too rare to win a merge
KNOWN = 500_000         # words whose tokens a process remembers: some 100 MB


class Tokenizer:
    """Text to tokens and back.

    A token 0..255 is that byte; token 256 + i is `merges[i]`, a pair of earlier tokens; END is the
    last. Each stands for exact bytes, also where it begins or ends inside a character.

    >>> tokenizer = Tokenizer([(104, 105)])
    >>> tokenizer.encode("hi, hi")
    [256, 44, 32, 256]
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {tuple(pair): 256 + i for i, pair in enumerate(merges)}     # -> their token
        self.bytes = [bytes([i]) for i in range(256)]       # token -> what it stands for
        for left, right in self.rank:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.bytes += [b""] * (VOCAB_SIZE - len(self.bytes))        # END, and what is not in use
        self.known = functools.lru_cache(KNOWN)(self.merge)     # merge(), with a memory

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`. It is fast since words repeat: only new ones are merged."""
        return list(itertools.chain.from_iterable(map(self.known, re.findall(WORD, text))))

    def merge(self, word: str) -> list[int]:
        """Return the tokens of a word: of the pairs in it, the earliest learned is joined first."""
        tokens = list(word.encode("utf-8", "surrogatepass"))
        while len(tokens) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in itertools.pairwise(tokens)]
            first = min(ranks)
            if first == math.inf:
                break
            at = ranks.index(first)
            tokens[at:at + 2] = [first]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; what is not UTF-8 in it becomes replacement characters."""
        data = b"".join(self.bytes[token] for token in tokens)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def lengths(self) -> np.ndarray:
        """Return the bytes of each token, (VOCAB_SIZE,) int64: 0 for END."""
        return np.array([len(data) for data in self.bytes], dtype=np.int64)


def join(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Return `word` with `token` in the place of each `pair`, from the left."""
    left, right = pair
    joined = [-1]
    for this in word:
        if this == right and joined[-1] == left:
            joined[-1] = token
        else:
            joined.append(this)
    return joined[1:]


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[int, int]]:
    """Return at most `count` merges: again and again the most frequent pair of neighbours.

    Each common word is held once with its count, and a merge visits only words with the pair.

    >>> learn_merges(["hi, hi"], 1)
    [(104, 105)]
    """
    counter, characters = collections.Counter(), 0
    for text in texts:
        counter.update(re.findall(WORD, text))
        characters += len(text)
        if characters > SAMPLE:
            break
    common = counter.most_common(COMMON)
    words = [list(word.encode("utf-8", "surrogatepass")) for word, _ in common]
    times = [n for _, n in common]
    counts = collections.Counter()              # pair -> how often it occurs
    where = collections.defaultdict(set)        # pair -> the words that have, or once had, it
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            counts[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]       # n may be outdated, and too high
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < count:
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -negative < 2:
            break
        token, fresh = 256 + len(merges), set()
        merges.append(pair)
        for i in where.pop(pair):
            for old in itertools.pairwise(words[i]):
                counts[old] -= times[i]
            words[i] = join(words[i], pair, token)
            for new in itertools.pairwise(words[i]):
                counts[new] += times[i]
                if token in new:
                    where[new].add(i)
                    fresh.add(new)
        for new in fresh:
            heapq.heappush(heap, (-counts[new], new))
    return merges


# --------------------------------------------------------------------------------------------------
# 4  Tokens: the documents of each split as one flat file of uint16

BLOCK = 1_000_000       # characters that a core encodes at a time
CHECKPOINT = 8          # blocks after which an interrupted preparation goes on


def blocks(stream: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group documents, (split, text), into blocks of about BLOCK characters."""
    block, size = [], 0
    for split, text in stream:
        block.append((split, text))
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    yield block


_tokenizer: Tokenizer       # of a worker process


def start_worker(merges: list[tuple[int, int]]):
    global _tokenizer
    _tokenizer = Tokenizer(merges)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process


def encode_block(block: list[tuple[str, str]]) -> tuple[int, int, dict[str, bytes]]:
    """Return (documents, bytes of text, {split: its tokens as uint16})."""
    tokens, size = {split: [] for split in SPLITS}, 0
    for split, text in block:
        tokens[split] += _tokenizer.encode(text)
        tokens[split].append(END)
        size += len(text.encode("utf-8", "surrogatepass"))
    return len(block), size, {s: np.array(t, dtype=np.uint16).tobytes() for s, t in tokens.items()}


def encode_blocks(todo: Iterable[list], tokenizer: Tokenizer) -> Iterator[tuple]:
    """Yield encode_block() of each block, in order, with all cores; never reads far ahead."""
    affinity = getattr(os, "sched_getaffinity", None)       # what we may use; unknown on a Mac
    cores = len(affinity(0)) if affinity else os.cpu_count()
    ahead = collections.deque()
    with multiprocessing.Pool(cores, start_worker, [list(tokenizer.rank)]) as pool:
        for block in todo:
            ahead.append(pool.apply_async(encode_block, [block]))
            if len(ahead) > 2 * cores:
                yield ahead.popleft().get()
        while ahead:
            yield ahead.popleft().get()


def write_tokens(stream: Iterator, tokenizer: Tokenizer, folder: Path, total: int) -> dict:
    """Write the tokens of `stream` to folder/{train,val,test}.bin, some blocks at a time.

    state.json says how many documents are safe in the files. After an interruption that many are
    skipped, and what the files have beyond it is cut off. Returns the last state: {"documents",
    "text", "train", "val", "test"}, the last four in bytes. total: the bytes to expect.
    """
    path = folder / "state.json"
    state = dict.fromkeys(("documents", "text", *SPLITS), 0)
    if path.exists():
        state = json.loads(path.read_text())
    progress = Progress("encoding", total, state["text"])
    results = encode_blocks(blocks(itertools.islice(stream, state["documents"], None)), tokenizer)
    while some := list(itertools.islice(results, CHECKPOINT)):
        for split in SPLITS:
            with (folder / f"{split}.bin").open("ab") as file:
                file.truncate(state[split])
                state[split] += file.write(b"".join(tokens[split] for _, _, tokens in some))
                file.flush()
                os.fsync(file.fileno())
        state["documents"] += sum(count for count, _, _ in some)
        state["text"] += sum(size for _, size, _ in some)
        write_whole(path, json.dumps(state))
        progress(state["text"])
    progress(state["text"], last=True)
    return state


def make(folder: Path, name: str, files: list[Path], size: int, reader: Callable):
    """Fill `folder`: tokenizer.json, {train,val,test}.bin, and meta.json when all is there."""
    share = 0.06 if size < 100e6 else 0.01      # of each of val and test
    if not (folder / "tokenizer.json").exists():
        print(f"{name}: training a tokenizer of {VOCAB_SIZE} tokens", flush=True)
        texts = (text for split, text in documents(files, reader, share) if split == "train")
        merges = learn_merges(texts, VOCAB_SIZE - 257)
        write_whole(folder / "tokenizer.json", json.dumps(merges))
    tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    state = write_tokens(documents(files, reader, share), tokenizer, folder, size)
    tokens = sum(state[split] for split in SPLITS) // 2 - state["documents"]
    bytes_per_token = state["text"] / tokens if tokens else 3.0
    need = MIN_WINDOWS * SEQ_LEN + 1        # tokens in each of val and test
    if min(state["val"], state["test"]) < 2 * need:
        fail(f"too little text in {name}: {state['text'] / 1e6:.2f} MB, and a score needs about "
             f"{1.2 * need * bytes_per_token / share / 1e6:.1f} MB: add text")
    write_whole(folder / "meta.json", json.dumps({
        "name": name, "documents": state["documents"], "text_mb": round(state["text"] / 1e6, 3),
        "bytes_per_token": round(bytes_per_token, 4), "train_tokens": state["train"] // 2,
        "sha256": sha256([folder / f"{split}.bin" for split in SPLITS])}))


def prepare(data: str) -> Path:
    """Make `data` ready, unless it is, and return its folder."""
    start = time.monotonic()
    name, files, size, reader = source(data)
    folder = CACHE / f"{name}-v{VOCAB_SIZE}"
    with locked(folder):
        try:
            if not (folder / "meta.json").exists():
                make(folder, name, files, size, reader)
        except gzip.BadGzipFile as error:
            for made in folder.glob("*.json"):      # from what came before the damage
                made.unlink()
            fail(f"{error}: the same command fetches it again")
    meta = json.loads((folder / "meta.json").read_text())
    write_whole(CACHE / "current", folder.name)
    print(f"{name}: {meta['text_mb']} MB in {meta['documents']} documents, "
          f"{meta['train_tokens'] / 1e6:.2f}M tokens to train on, {meta['bytes_per_token']} bytes "
          f"per token; ready in {time.monotonic() - start:.1f} s", flush=True)
    return folder


def prepare_or_fall_back(data: str | None) -> Path:
    """Prepare `data`. The default data that cannot be reached is replaced by stdlib, loudly."""
    try:
        try:
            return prepare(data or DEFAULT_DATA)
        except requests.RequestException as error:
            if data:
                fail(f"--data {data} cannot be downloaded ({error}): check the network and try "
                     f"again, or give --data stdlib or a folder of text")
            print(f"WARNING: {DEFAULT_DATA} cannot be downloaded ({error}). Going on with the "
                  f"Python sources (stdlib): scores will be of code, not of web text. When there "
                  f"is a network: python prepare.py --data {DEFAULT_DATA}", file=sys.stderr)
            return prepare("stdlib")
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or CACHE}; AUTORESEARCH_CACHE names "
             f"another place for data")


# --------------------------------------------------------------------------------------------------
# 5  The clock: it starts with the first batch and ends the loop over batches() at the budget


class Clock:
    """What a run may use, and what it has used. Monotonic: a clock that is set changes nothing.

    tell(event, limit=s, ...) sends the driver a line; with a limit, the driver ends the run if its
    next phase does not begin within s seconds.
    """

    def __init__(self, tokens: np.ndarray, seed: int, budget: float, tell: Callable):
        self.tokens, self.budget, self.tell = tokens, budget, tell
        self.rng = np.random.default_rng(seed)
        self.start: float | None = None
        self.steps = self.seen = 0              # batches and tokens handed out

    def elapsed(self) -> float:
        return monotonic() - self.start

    def overtime(self) -> float:
        """Return the seconds after which a run is invalid."""
        return self.budget * (1 + OVERTIME[0]) + OVERTIME[1]


_clock: Clock           # of the run in this process


def synchronize():
    """Wait until the device has done what it was told."""
    if CUDA:
        torch.cuda.synchronize()
    elif DEVICE == "mps":
        torch.mps.synchronize()


GOLDEN_RATIO = (1 + 5 ** 0.5) / 2   # of all numbers the one that spreads best (Weyl sequences)


def _windows(tokens: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of length + 1 tokens forever: each epoch all of them, at a new offset.

    Multiples of an irrational number, modulo 1, are spread evenly however many there are. In their
    order a run that ends within an epoch has seen all parts of the text alike, whatever its seed.
    Scores of equally many steps scatter by 0.0025 bpb with it and by 0.006 shuffled.
    """
    while True:
        offset = rng.integers(length)
        count = (len(tokens) - 1 - offset) // length
        for i in np.argsort((np.arange(count) * GOLDEN_RATIO + rng.random()) % 1):
            yield tokens[offset + i * length:offset + (i + 1) * length + 1]


def batches(batch_size: int, seq_len: int = SEQ_LEN
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield (x, y, progress) until the budget is spent.

    x, y: int64 (batch_size, seq_len) on DEVICE; y[i, t] is the token after x[i, t]. progress: in
    [0, 1), the share of the budget that is spent, to drive schedules with. The clock starts at the
    first batch, whoever draws it, and is never set back: a second loop goes on with the time that
    is left. No batch is handed out for which the time of the last step is no longer left.
    Raises ValueError when there are no windows of seq_len + 1 tokens.
    """
    clock, windows = _clock, _windows(_clock.tokens, seq_len, _clock.rng)
    if not 0 < seq_len < len(clock.tokens) // 2:
        raise ValueError(f"seq_len {seq_len}: there are {len(clock.tokens)} tokens to train on")
    ahead = collections.deque()     # marks in the CUDA stream, one per step the GPU may be at
    told, last = -math.inf, math.inf    # when progress was told, and the last batch handed out
    while True:
        batch = np.stack(list(itertools.islice(windows, batch_size))).astype(np.int64)
        pinned = torch.from_numpy(batch).pin_memory() if CUDA else torch.from_numpy(batch)
        batch = pinned.to(DEVICE, non_blocking=True)
        if CUDA:    # one step ahead of the GPU, never two: it never waits, the clock stays true
            ahead.append(torch.cuda.Event())
            ahead[-1].record()
            if len(ahead) > 1:
                ahead.popleft().synchronize()
        else:
            synchronize()
        if clock.start is None:
            synchronize()
            clock.tell("training", limit=clock.overtime() + 10)
            clock.start = monotonic()
        now = clock.elapsed()
        step, last = max(0.0, now - last), now      # 0 before the first
        if now + step * (2 if CUDA else 1) >= clock.budget:     # a GPU is still at the last one
            break
        if now - told >= 1:
            told = now
            clock.tell("progress", share=now / clock.budget,
                       tokens_per_second=clock.seen / max(now, 1e-3))
        clock.steps += 1
        clock.seen += batch_size * seq_len
        yield batch[:, :-1], batch[:, 1:], now / clock.budget


# --------------------------------------------------------------------------------------------------
# 6  The metric: bits per byte of held-out text, and the probes that make it worth believing


class Invalid(Exception):
    """A run whose score would mean nothing. The text says why."""


def token_nats(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor,
               rng: np.random.Generator) -> torch.Tensor:
    """Return -ln p(y[i, t]) given x[i, :t+1]: two (B, T) int64 -> (B, T) float32, on the CPU.

    Raises Invalid when the logits are not what they have to be.
    """
    logits = model(x.to(DEVICE, copy=True))
    if type(logits) is not torch.Tensor:
        raise Invalid(f"the model returns {type(logits).__name__}, not a plain tensor of logits")
    if logits.shape != (*x.shape, VOCAB_SIZE) or not logits.is_floating_point():
        raise Invalid(f"the model returns {logits.dtype} {tuple(logits.shape)}, not floating-point "
                      f"logits {(*x.shape, VOCAB_SIZE)}")
    if not torch.isfinite(logits).all():
        raise Invalid("logits that are not finite")
    logits = logits.float()
    nats = cross_entropy(logits.flatten(0, 1), y.flatten().to(DEVICE), reduction="none")
    nats = nats.cpu().view(y.shape)
    i, t = (int(rng.integers(size)) for size in x.shape)    # a token by hand: is torch still torch?
    row, top = logits[i, t].tolist(), logits[i, t].max().item()
    nat = math.log(sum(math.exp(logit - top) for logit in row)) + top - row[y[i, t]]
    if not math.isclose(nat, nats[i, t], rel_tol=1e-4, abs_tol=1e-3):  # float32: 1e-6
        raise Invalid("torch no longer computes cross_entropy: something has replaced part of it")
    return nats


def splice(x: torch.Tensor, other: torch.Tensor, rng: np.random.Generator):
    """Make a probe of a batch: what may not matter is changed, and what may is kept.

    Every row keeps its tokens up to a cut of its own and goes on as a row of `other`. A fifth is
    cut at 0, so becomes another row; a fifth at T, so that only its neighbours change, which its
    last token could know of. The rows change places. Returns (probe, order, cuts): row i of the
    probe was row order[i], and its first cuts[i] predictions have to be what they were.
    x, other, probe: (B, T) int64.
    """
    rows, length = x.shape
    cuts = rng.integers(1, length, rows)
    cuts[:rows // 5], cuts[-(rows // 5):] = 0, length
    order, others, cuts = map(torch.from_numpy, (
        rng.permutation(rows), rng.permutation(rows), rng.permutation(cuts)))
    keep = torch.arange(length) < cuts[:, None]
    return torch.where(keep, x[order], other[others]), order, cuts


# Probes show how much predictions change where nothing has changed that they may depend on. What
# is left is rounding: none where a row is computed alike at any place of a batch, as CPUs do; where
# sums go in another order in other company (experts, atomics), a bf16 logit of 4, in steps of 1/32,
# is off by 0.01, and by up to 1 in the few tokens whose near-tie is routed elsewhere. Rounding has
# no direction, and what is gained by seeing too much has one.
BIAS = 0.002        # nats: how far from 0 a mean may be; 0.001 bpb, far below the noise of seeds
SIGMAS = 6          # standard errors on top of it: rounding gets there in one of 10^8 runs
SPREAD = 0.02       # nats, the mean size everywhere, the median at the cuts: twice that of bf16
LARGEST = 1.0       # nats, what one token counts at most: two or three near-ties are no leak


def refuse_leaks(found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]):
    """Raise Invalid if predictions changed by more than rounding.

    found, for every probe: how its (B, T) nats changed; which of them had to stay; where those end
    (the last token before the text goes on differently: whoever sees one token ahead loses all of
    it there, and nothing elsewhere); did the probe come later than the batch it was made of?
    """
    anywhere = torch.cat([change[kept] for change, kept, _, _ in found])
    later = torch.cat([change[kept] * (1 if late else -1) for change, kept, _, late in found])
    at_cut = torch.cat([change[last] for change, _, last, _ in found])
    sigma = anywhere.square().mean().sqrt().item()
    spread = max(anywhere.abs().mean().item(), at_cut.abs().median().item())
    biased = any(sample.mean().abs() > BIAS + SIGMAS * sigma / len(sample) ** 0.5
                 for sample in (anywhere, later, at_cut))
    if biased or spread > SPREAD:
        raise Invalid(f"leak: predictions change when only later tokens, other rows of the batch "
                      f"and earlier calls change (by {at_cut.mean():+.4f} nats at the last token "
                      f"before the change, {anywhere.mean():+.4f} anywhere, {later.mean():+.4f} "
                      f"from call to call, or {spread:.4f} in size); logits at t may depend on "
                      f"tokens[:t+1] of their row alone")


def weights(model: torch.nn.Module) -> list[float]:
    """Return a number for each parameter, that changes when it is trained."""
    return [p.detach().abs().float().sum().item() for p in model.parameters()]


@torch.no_grad()
def evaluate(model: torch.nn.Module, splits: dict[str, np.ndarray], lengths: np.ndarray
             ) -> dict[str, float]:
    """Return {split: bits per byte} of the model for flat arrays of tokens; lengths: bytes a token.

    Bits per byte = sum of -log2 p(token) / sum of the token's bytes, both over tokens that have
    bytes (END has none). The same windows in the same batches for every candidate. Probes look
    exactly like evaluation and stand at random places in it, so that a leak that begins late or
    needs full batches shows as well: the first call is one, and the last, of the batch that went
    best, which is where a leak in a few calls alone would be. Raises Invalid.
    """
    rng, before = np.random.default_rng(), weights(model)   # no candidate knows where probes are
    todo: dict[tuple[str, int], tuple] = {}     # (split, batch) -> x, y: (EVAL_ROWS, SEQ_LEN) int64
    for split, tokens in splits.items():
        count = min(EVAL_WINDOWS, (len(tokens) - 1) // SEQ_LEN) // EVAL_ROWS
        size = count * EVAL_ROWS * SEQ_LEN
        x, y = (torch.from_numpy(tokens[i:i + size].astype(np.int64))
                .view(count, EVAL_ROWS, SEQ_LEN) for i in (0, 1))
        todo |= {(split, b): (x[b], y[b]) for b in range(count)}
    keys = list(todo)
    first, *others = rng.permutation(len(keys))[:max(1, round(PROBE_SHARE * len(keys)) - 1)]
    middle = [(key, False) for key in keys] + [(keys[i], True) for i in others]
    calls = [(keys[first], True), *(middle[i] for i in rng.permutation(len(middle))), (None, True)]

    nats: dict[tuple[str, int], torch.Tensor] = {}
    probes: list[tuple] = []
    for key, is_probe in calls:
        key = key or min(keys, key=lambda key: nats[key].mean())
        x, y = todo[key]
        if is_probe:
            probe, order, cuts = splice(x, todo[keys[rng.integers(len(keys))]][0], rng)
            probes.append((key, token_nats(model, probe, y[order], rng), order, cuts, key in nats))
        else:
            nats[key] = token_nats(model, x, y, rng)
    found = []
    for key, probed, order, cuts, late in probes:
        change = (probed - nats[key][order]).double().clamp(-LARGEST, LARGEST)
        left = cuts[:, None] - torch.arange(SEQ_LEN)    # predictions that have to stay, from t on
        found.append((change, left > 0, left == 1, late))
    refuse_leaks(found)
    if weights(model) != before:
        raise Invalid("the model's weights changed during evaluation: nothing trains after train()")

    bpb = {}
    for split in splits:
        size = torch.from_numpy(lengths)[torch.cat([todo[k][1] for k in keys if k[0] == split])]
        total = torch.cat([nats[k] for k in keys if k[0] == split]).double()[size > 0].sum().item()
        bpb[split] = total / math.log(2) / size.sum().item()
    return bpb


@torch.no_grad()
def sample(model: torch.nn.Module, folder: Path, count: int = 64) -> str:
    """Return how the model goes on with the beginning of val, drawn at temperature 0.8."""
    tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    tokens, given = torch.full((1, SEQ_LEN), END), 24
    text = np.fromfile(folder / "val.bin", np.uint16, given)
    tokens[0, :given] = torch.from_numpy(text.astype(np.int64))
    for at in range(given, given + count):  # always a whole window: what is behind cannot matter
        logits = model(tokens.to(DEVICE))[0, at - 1].float().cpu()
        tokens[0, at] = torch.multinomial(torch.softmax(logits / 0.8, 0), 1)
    return tokenizer.decode(tokens[0, :given + count].tolist())


# --------------------------------------------------------------------------------------------------
# 7  One run: a fresh process, whose main is this file and never the candidate


def load_candidate(path: Path) -> types.ModuleType:
    """Import a train.py as the module `candidate`, which may use only a part of prepare.py.

    What it may put in the place of prepare.batches, or of anything, it puts there for itself alone.
    """
    face = types.ModuleType("prepare", "what a train.py may use of prepare.py")
    face.DEVICE, face.SEQ_LEN, face.VOCAB_SIZE, face.batches = DEVICE, SEQ_LEN, VOCAB_SIZE, batches
    sys.modules["prepare"] = sys.modules["__main__"] = face
    spec = importlib.util.spec_from_file_location("candidate", path)
    module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_memory_mb() -> float:
    """Return the most memory this process has held: of the GPU, or of the machine without one."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024      # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(path: Path, seed: int, budget: float, folder: Path, tell: Callable, began: float
            ) -> torch.nn.Module:
    """Train the train.py at `path` once and report. Raises Invalid, or what train() raises."""
    global _clock
    data = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in SPLITS}
    tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    clock = _clock = Clock(data["train"], seed, budget, tell)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = load_candidate(path).train()
    if not isinstance(model, torch.nn.Module):
        raise Invalid(f"train() returned {type(model).__name__}, not a torch.nn.Module")
    model.eval()        # before the clock is read: what a model does here is part of its training
    synchronize()
    if clock.start is None:
        raise Invalid("train() returned without drawing a batch from prepare.batches()")
    train_seconds = clock.elapsed()
    if train_seconds > clock.overtime():
        raise Invalid(f"overtime: train() returned {train_seconds:.1f} s after its first batch; "
                      f"the budget is {budget:g} s and nothing may follow the last batch")
    clock.budget = 0.0      # no loop over batches() goes on from here
    tell("evaluation", limit=EVAL_LIMIT)
    memory, now = peak_memory_mb(), monotonic()
    bpb = evaluate(model, {"val": data["val"], "test": data["test"]}, tokenizer.lengths())
    report = {"val_bpb": bpb["val"], "test_bpb": bpb["test"], "train_seconds": train_seconds,
              "startup_seconds": clock.start - began, "eval_seconds": monotonic() - now,
              "total_seconds": monotonic() - began, "peak_memory_mb": memory,
              "num_steps": clock.steps, "num_tokens": clock.seen,
              "num_params": sum(p.numel() for p in model.parameters())}
    tell("report", **report)
    print(f"""---
val_bpb:          {report["val_bpb"]:.6f}
training_seconds: {train_seconds:.1f}
total_seconds:    {report["total_seconds"]:.1f}
startup_seconds:  {report["startup_seconds"]:.1f}
eval_seconds:     {report["eval_seconds"]:.1f}
peak_memory_mb:   {memory:.1f}
num_steps:        {clock.steps}
total_tokens_M:   {clock.seen / 1e6:.2f}
tokens_per_s:     {clock.seen / train_seconds:.0f}
num_params_M:     {report["num_params"] / 1e6:.2f}
device:           {DEVICE}
data:             {folder.name}""", flush=True)
    return model


def process_start() -> float:
    """Return when this process began, on the clock of monotonic(); where that is not known, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return monotonic() - up
    except (OSError, AttributeError):
        return monotonic()


def one_run(path: Path, seed: int, budget: float, folder: Path, key: str | None) -> int:
    """Measure a train.py and return the exit code. What counts goes out on lines with `key` first.

    `key` is a secret of this run, on the command line since that passes through every launcher.
    sys.argv loses it before the candidate is imported, so what that prints is never believed; `ps`
    still shows it, by which the driver finds runs that it left behind.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)

    def tell(event: str, **values):
        if key:
            out.write(f"\n{key} {json.dumps({'event': event, **values})}\n")

    meta = json.loads((folder / "meta.json").read_text())
    gpu = torch.cuda.get_device_name() if CUDA else DEVICE
    tell("setup", limit=SETUP_LIMIT, device=gpu, budget=budget, data=meta["name"],
         sha256=meta["sha256"], seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE,
         prepare=sha256([Path(__file__)])[:16])
    try:
        model = measure(path, seed, budget, folder, tell, process_start())
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
    args = parser.parse_args()
    sys.argv[1:] = sys.orig_argv[1:] = []
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
