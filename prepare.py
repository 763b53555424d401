"""The ground that stands still: data, tokenizer, batches, the clock and the metric.

    python prepare.py                      # prepare the default data: c4 with CUDA, stdlib without
    python prepare.py --data stdlib        # the Python sources that every installation has; no network
    python prepare.py --data tinystories   # children's stories, 2.2 GB
    python prepare.py --data c4:8          # eight shards of web text, 0.8 GB of text each
    python prepare.py --data my/texts      # a file or a folder of UTF-8 text of your own

Nobody edits this file during research: two numbers can be compared because of what stands here.

  1  Scale       the constants, in two settings
  2  Documents   text from files or over HTTP, cleaned, in a fixed order
  3  Tokenizer   byte-pair encoding, trained here
  4  Tokens      documents -> train.bin, val.bin, test.bin
  5  The clock   batches(): the only way to the training data, and the only budget
  6  The metric  bits per byte, and the probes that make it worth believing
  7  One run     import a train.py, train, probe, evaluate, report

What it does not cover: code that is written to attack the machine. A train.py runs with your rights; README.md shows
the line that puts it into a sandbox.
"""

import argparse
import collections
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
import sys
import sysconfig
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import requests
import torch
from torch.nn.functional import cross_entropy  # bound here, before a candidate could put another in its place

# ---------------------------------------------------------------------------------------------------------------------
# 1  Scale: what the machine has decides between two settings of the same constants

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
CUDA = DEVICE == "cuda"
SEQ_LEN = 2048 if CUDA else 256        # tokens in a window, in training (by default) and in evaluation (always)
VOCAB_SIZE = 8192 if CUDA else 2048    # tokens: 256 bytes, the merges, and one that ends a document
BUDGET = 300 if CUDA else 60           # seconds of training in a run
DEFAULT_DATA = "c4" if CUDA else "stdlib"

EVAL_ROWS = 16             # windows in a batch of evaluation
EVAL_WINDOWS = 512         # windows evaluated in each of val and test, or what there is
MIN_WINDOWS = 64           # below this a score would say little
PROBE_SHARE = 1 / 8        # probes per batch of evaluation: 1 / 9 of its time
OVERTIME = 0.02, 0.5       # share of the budget + seconds, for work after the last batch such as averaging weights;
                           # 2% more training is worth about 0.002 bpb, less than the noise
SETUP_LIMIT = 300          # seconds for start and compilation, before the first batch
EVAL_LIMIT = 180           # seconds for evaluation

END = VOCAB_SIZE - 1       # the token that ends a document; it stands for no bytes
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def fail(message: str):
    """End with one line and exit code 1: a person's mistake or the world's, not a bug."""
    raise SystemExit(f"prepare.py: {message}")


def write_whole(path: Path, text: str):
    """Write a file under a temporary name and rename it, so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(paths: list[Path]) -> str:
    """Return one fingerprint of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class Progress:
    """One line that says how far, how fast and how long still: redrawn in a terminal, every 10 s elsewhere."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.first, self.start, self.said = what, total, done, time.monotonic(), 0.0

    def __call__(self, done: int):
        now, last = time.monotonic(), done >= self.total > 0
        if now - self.said < (0.2 if sys.stderr.isatty() else 10) and not last:
            return
        rate = (done - self.first) / max(now - self.start, 1e-3)
        left = max(self.total - done, 0) / max(rate, 1)
        line = f"{self.what}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        print(f"\r{line}\033[K" if sys.stderr.isatty() else line, end="\n" if last or not sys.stderr.isatty() else "",
              file=sys.stderr, flush=True)
        self.said = math.inf if last else now


# ---------------------------------------------------------------------------------------------------------------------
# 2  Documents: a source is a list of files, and knows how to read documents from each

PIECE = 50_000      # characters: a longer text is cut at a line end into documents of about this length
SHORTEST = 64       # characters: a document with less than this is dropped


def text_pieces(path: Path) -> Iterator[str]:
    """Yield the documents of a text file: cut at <|endoftext|> where it has that, and into pieces where long."""
    piece, size = [], 0
    with open(path, encoding="utf-8", newline="") as file:
        while line := file.readline(PIECE):
            head, ends, tail = line.partition("<|endoftext|>")
            piece.append(head)
            size += len(head)
            if ends or size >= PIECE:
                yield "".join(piece)
                piece, size = [tail], len(tail)
    yield "".join(piece)


def json_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a gzip file of JSON lines, as C4 comes: {"text": ..., ...}"""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def is_text(path: Path) -> str | None:
    """None for a file of UTF-8 text, else why not. Reads it in chunks."""
    try:
        if not path.is_file() or path.stat().st_size == 0:
            return "empty" if path.is_file() else "unreadable"
        with open(path, encoding="utf-8", newline="") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError:
        return "unreadable"


def text_files(name: str, paths: list[Path]) -> tuple[str, list[Path], int]:
    """Keep what is text, say what is not. Returns (a name with a fingerprint of the contents, files, bytes)."""
    good, skipped, size = [], collections.Counter(), 0
    for path in paths:
        if why := is_text(path):
            skipped[why] += 1
            continue
        good.append(path)
        size += path.stat().st_size
    if skipped:
        print(f"{name}: skipped {sum(skipped.values())} of {len(paths)} files: "
              + ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())))
    if not good:
        fail(f"no text in {name}: give a file or a folder of UTF-8 text with --data PATH")
    return f"{name}-{sha256(good)[:8]}", good, size


def download(url: str, path: Path, tries: int = 8) -> Path:
    """Fetch `url` to `path` and return that; go on where an earlier try or an earlier process stopped.

    Raises requests.RequestException when the server cannot be reached or refuses, after `tries` tries.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        if path.exists():
            return path
        have = part.stat().st_size if part.exists() else 0
        try:
            with requests.get(url, headers={"Range": f"bytes={have}-", "Accept-Encoding": "identity"},
                              stream=True, timeout=30) as answer:
                if answer.status_code == 416:       # nothing is left to send, or the file is another one now
                    total = int(answer.headers.get("Content-Range", "*/0").rpartition("/")[2])
                    if have != total:
                        part.unlink()
                        raise requests.ConnectionError(f"{url} has changed: starting again")
                else:
                    answer.raise_for_status()
                    have = have if answer.status_code == 206 else 0     # 200: the server sends all of it
                    total = have + int(answer.headers.get("Content-Length") or 0)
                    progress = Progress(path.name, total, have)
                    with open(part, "ab" if have else "wb") as file:
                        for chunk in answer.iter_content(1 << 18):
                            file.write(chunk)
                            have += len(chunk)
                            progress(have)
            if total and have != total:
                raise requests.ConnectionError(f"{url}: {have} of {total} bytes came")
            os.replace(part, path)
        except requests.RequestException as error:
            refused = error.response is not None and error.response.status_code in (401, 403, 404)
            if refused or attempt == tries:
                raise
            pause = min(60, 2 ** attempt) * random.uniform(0.5, 1)
            print(f"{path.name}: {error}; again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)


def source(data: str) -> tuple[str, list[Path], int, callable]:
    """Find what `data` names. Returns (name, files, bytes of text, reader of one file); downloads what is missing."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/datasets"
    kind, _, count = data.partition(":")
    if kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        hidden = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}    # not everywhere
        paths = [p for p in sorted(root.rglob("*.py")) if not hidden & set(p.relative_to(root).parts)]
        return *text_files("stdlib", paths), text_pieces
    if kind == "tinystories":
        file = "TinyStoriesV2-GPT4-train.txt"
        path = download(f"{hub}/roneneldan/TinyStories/resolve/main/{file}", CACHE / "downloads" / file)
        return kind, [path], path.stat().st_size, text_pieces
    if kind == "c4":
        if not (count or "4").isdigit() or not 1 <= int(count or 4) <= 1024:
            fail(f"--data {data}: c4:N takes N from 1 to 1024 shards")
        names = [f"c4-train.{i:05d}-of-01024.json.gz" for i in range(int(count or 4))]
        paths = [download(f"{hub}/allenai/c4/resolve/main/en/{n}", CACHE / "downloads" / n) for n in names]
        return f"c4-{len(names)}", paths, int(2.6 * sum(p.stat().st_size for p in paths)), json_texts
    path = Path(data).expanduser()
    if not path.exists():
        fail(f"--data {data}: neither stdlib, tinystories, c4 nor an existing file or folder")
    paths = [path] if not path.is_dir() else \
        [p for p in sorted(path.rglob("*"))
         if not p.is_dir() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return *text_files(re.sub(r"\W+", "-", path.resolve().name), paths), text_pieces


def documents(files: list[Path], reader: callable, share: float) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for each document, in an order that is always the same.

    Near-empty documents and exact duplicates are dropped. A document goes to the split that is furthest behind its
    share, so that val and test are exactly as large as they should be and come from all over the text.
    """
    seen, size = set(), {"train": 0, "val": 0, "test": 0}
    shares = {"train": 1 - 2 * share, "val": share, "test": share}
    for text in itertools.chain.from_iterable(map(reader, files)):
        key = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if len(text.strip()) < SHORTEST or key in seen:
            continue
        seen.add(key)
        split = min(size, key=lambda s: size[s] / shares[s])
        size[split] += len(text)
        yield split, text


# ---------------------------------------------------------------------------------------------------------------------
# 3  Tokenizer: byte-pair encoding (Sennrich et al. 2016, arxiv.org/abs/1508.07909) over words, as in GPT-2

# Every character falls into exactly one word. Lengths are bounded, so that no input makes encoding quadratic.
WORD = r" ?[^\W\d]{1,32}|\d{1,3}| ?[^\s\w]{1,16}|\s{1,64}(?!\S)|\s"
SAMPLE = 64_000_000     # characters of training text that the tokenizer is trained on


class Tokenizer:
    """Text to tokens and back.

    A token 0..255 is that byte; token 256 + i is `merges[i]`, a pair of earlier tokens; END is the last.

    >>> tokenizer = Tokenizer([(104, 105)])
    >>> tokenizer.encode("hi, hi")
    [256, 44, 32, 256]
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {pair: 256 + i for i, pair in enumerate(map(tuple, merges))}   # (left, right) -> their token
        self.bytes = [bytes([i]) for i in range(256)]                              # token -> what it stands for
        for left, right in self.rank:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.words: dict[str, list[int]] = {}                                      # every word met so far

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`. Speed comes from words that repeat: only a new word is merged at all."""
        tokens, words = [], self.words
        for word in re.findall(WORD, text):
            found = words.get(word)
            if found is None:
                if len(words) > 1_000_000:      # bounds memory, some 200 MB
                    words.clear()
                found = words[word] = self.merge(list(word.encode("utf-8", "surrogatepass")))
            tokens += found
        return tokens

    def merge(self, tokens: list[int]) -> list[int]:
        """Replace pairs by their token, the earliest learned first, until no pair is known."""
        while len(tokens) > 1:
            rank, i = min((self.rank.get(pair, math.inf), i) for i, pair in enumerate(zip(tokens, tokens[1:])))
            if rank == math.inf:
                break
            tokens[i:i + 2] = [rank]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; bytes that are not valid UTF-8 become the replacement character."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"".join(self.bytes[t] if t < len(self.bytes) else b"" for t in tokens)

    def lengths(self) -> np.ndarray:
        """Return the exact bytes of each token, (VOCAB_SIZE,) int64; 0 for END and for unused tokens."""
        lengths = np.zeros(VOCAB_SIZE, dtype=np.int64)
        lengths[:len(self.bytes)] = [len(b) for b in self.bytes]
        return lengths


def learn_merges(texts: Iterator[str], count: int) -> list[tuple[int, int]]:
    """Return at most `count` merges: again and again the most frequent pair of neighbours in a word.

    Each distinct word is held once with its count, and a merge visits only the words that have the pair.
    """
    counter, read = collections.Counter(), 0
    for text in texts:
        counter.update(re.findall(WORD, text))
        read += len(text)
        if read > SAMPLE:
            break
    words = [list(word.encode("utf-8", "surrogatepass")) for word in counter]
    weights = list(counter.values())
    counts: collections.Counter = collections.Counter()     # pair -> how often it occurs
    where = collections.defaultdict(set)                    # pair -> words that have, or once had, it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]       # may hold outdated counts: checked when popped
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < count:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -n < 2:
            break
        token, changed = 256 + len(merges), set()
        merges.append(pair)
        for i in where.pop(pair):
            word, new, j = words[i], [], 0
            while j < len(word):
                both = j + 1 < len(word) and (word[j], word[j + 1]) == pair
                new.append(token if both else word[j])
                j += 2 if both else 1
            if len(new) == len(word):
                continue
            for old in zip(word, word[1:]):
                counts[old] -= weights[i]
            for fresh in zip(new, new[1:]):
                counts[fresh] += weights[i]
                if token in fresh:
                    where[fresh].add(i)
                    changed.add(fresh)
            words[i] = new
        for fresh in changed:
            heapq.heappush(heap, (-counts[fresh], fresh))
        del counts[pair]
    return merges


# ---------------------------------------------------------------------------------------------------------------------
# 4  Tokens: the documents of each split as one flat file of uint16

SPLITS = "train", "val", "test"
BLOCK = 1_000_000           # characters encoded at a time by one core
CHECKPOINT = 64             # blocks after which an interrupted preparation goes on


def blocks(stream: Iterator[tuple[str, str]]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Group documents into blocks. Yields (number of documents, [(split, text)])."""
    block, size = [], 0
    for split, text in stream:
        block.append((split, text))
        size += len(text)
        if size >= BLOCK:
            yield len(block), block
            block, size = [], 0
    if block:
        yield len(block), block


_tokenizer: Tokenizer       # of a worker process


def _start_worker(merges: list[tuple[int, int]]):
    global _tokenizer
    _tokenizer = Tokenizer(merges)


def _encode_block(block: tuple[int, list[tuple[str, str]]]) -> tuple[int, int, dict[str, bytes]]:
    """Return (documents, bytes of text, {split: its tokens as uint16})."""
    tokens, size = {split: [] for split in SPLITS}, 0
    for split, text in block[1]:
        tokens[split] += _tokenizer.encode(text)
        tokens[split].append(END)
        size += len(text.encode())
    return block[0], size, {s: np.array(t, dtype=np.uint16).tobytes() for s, t in tokens.items()}


def encode_documents(stream: Iterator[tuple[str, str]], tokenizer: Tokenizer, folder: Path, total: int) -> dict:
    """Write the tokens of `stream` to folder/{train,val,test}.bin with all cores; memory stays at some blocks a core.

    state.json says how many documents are safely in the files. After an interruption the files are cut to what it
    says and that many documents are skipped. Returns the last state: {"documents", "text", "train", "val", "test"},
    the last four in bytes.
    """
    path = folder / "state.json"
    state = json.loads(path.read_text()) if path.exists() else dict.fromkeys(("documents", "text", *SPLITS), 0)
    files = {split: open(folder / f"{split}.bin", "ab") for split in SPLITS}
    for split, file in files.items():
        file.truncate(state[split])
    progress = Progress("encoding", total, state["text"])
    with multiprocessing.Pool(initializer=_start_worker, initargs=(list(tokenizer.rank),)) as pool:
        todo = blocks(itertools.islice(stream, state["documents"], None))
        for start in itertools.count():     # one round a checkpoint, so that the pool never reads far ahead
            done = 0
            for count, size, tokens in pool.imap(_encode_block, itertools.islice(todo, CHECKPOINT)):
                state["documents"] += count
                state["text"] += size
                for split, data in tokens.items():
                    files[split].write(data)
                    state[split] += len(data)
                progress(min(state["text"], total - 1))
                done += 1
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            write_whole(path, json.dumps(state))
            if done < CHECKPOINT:
                break
    progress(total)
    return state


def prepare(data: str) -> Path:
    """Make `data` ready, unless it is, and return its folder: tokenizer.json, {train,val,test}.bin, meta.json."""
    begin = time.monotonic()
    name, files, size, reader = source(data)
    folder = CACHE / f"{name}-v{VOCAB_SIZE}"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        share = 0.06 if size < 100e6 else 0.01
        if not (folder / "tokenizer.json").exists():
            print(f"{name}: training a tokenizer of {VOCAB_SIZE} tokens")
            texts = (text for split, text in documents(files, reader, share) if split == "train")
            write_whole(folder / "tokenizer.json", json.dumps(learn_merges(texts, VOCAB_SIZE - 257)))
        tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
        state = encode_documents(documents(files, reader, share), tokenizer, folder, size)
        need, have = MIN_WINDOWS * SEQ_LEN + 1, min(state["val"], state["test"]) // 2
        if have < need:
            (folder / "state.json").unlink()
            fail(f"too little text in --data {data}: {state['text'] / 1e6:.2f} MB, and a score needs about "
                 f"{1.2 * state['text'] / 1e6 * need / max(have, 1):.1f} MB; add text")
        tokens = sum(state[s] for s in SPLITS) // 2
        write_whole(folder / "meta.json", json.dumps({
            "name": name, "documents": state["documents"], "text_mb": round(state["text"] / 1e6, 3),
            "bytes_per_token": round(state["text"] / (tokens - state["documents"]), 4),
            "train_tokens": state["train"] // 2, "sha256": sha256([folder / f"{split}.bin" for split in SPLITS])}))
    write_whole(CACHE / "current", folder.name)
    meta = json.loads((folder / "meta.json").read_text())
    print(f"{name}: {meta['text_mb']} MB in {meta['documents']} documents, {meta['train_tokens'] / 1e6:.2f}M tokens to "
          f"train on, {meta['bytes_per_token']} bytes per token; ready in {time.monotonic() - begin:.1f} s")
    return folder


def prepare_or_fall_back(data: str | None) -> Path:
    """Prepare `data`. The default data that cannot be reached is replaced by stdlib, loudly."""
    try:
        return prepare(data or DEFAULT_DATA)
    except requests.RequestException as error:
        if data:
            fail(f"--data {data} cannot be downloaded ({error}): check the network, or give --data stdlib or a folder")
        print(f"WARNING: {DEFAULT_DATA} cannot be downloaded ({error}). Going on with the Python sources (stdlib): "
              f"scores will be of code, not of web text. When there is a network: python prepare.py --data "
              f"{DEFAULT_DATA}", file=sys.stderr)
        return prepare("stdlib")


# ---------------------------------------------------------------------------------------------------------------------
# 5  The clock: it starts with the first batch, and the loop over batches() ends when the budget is spent


class Clock:
    """What a run may use, and what it has used. Monotonic: a clock that is set changes nothing."""

    def __init__(self, tokens: np.ndarray, seed: int, budget: float, tell: callable):
        self.tokens, self.budget, self.tell = tokens, budget, tell
        self.order = np.random.default_rng(seed)
        self.start: float | None = None
        self.steps = self.seen = 0              # batches and tokens handed out

    def elapsed(self) -> float:
        return time.monotonic() - self.start

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


def _windows(tokens: np.ndarray, length: int, order: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of length + 1 tokens forever: each epoch all of them once, at a new offset, in a new order."""
    while True:
        offset = order.integers(length)
        for i in order.permutation((len(tokens) - 1 - offset) // length):
            yield tokens[offset + i * length:offset + (i + 1) * length + 1]


def batches(batch_size: int, seq_len: int = SEQ_LEN) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield (x, y, progress) until the budget is spent.

    x, y: int64 (batch_size, seq_len) on DEVICE; y[i, t] is the token after x[i, t]. progress: in [0, 1), the share of
    the budget that is spent, to drive schedules with. The clock starts at the first batch, whoever draws it, and is
    never set back: a second loop goes on with the time that is left. No batch is handed out for which the time of the
    last step is no longer left.
    """
    clock, windows = _clock, _windows(_clock.tokens, seq_len, _clock.order)
    ahead = collections.deque()     # marks in the CUDA stream, one per step that the GPU may still be busy with
    told = begin = -math.inf
    while True:
        batch = np.stack(list(itertools.islice(windows, batch_size))).astype(np.int64)
        pinned = torch.from_numpy(batch).pin_memory() if CUDA else torch.from_numpy(batch)
        batch = pinned.to(DEVICE, non_blocking=True)
        if CUDA:    # prepare one step ahead of the GPU, never two: it does not wait for us, and the clock stays true
            ahead.append(torch.cuda.Event())
            ahead[-1].record()
            if len(ahead) > 1:
                ahead.popleft().synchronize()
        elif DEVICE == "mps":
            torch.mps.synchronize()
        if clock.start is None:
            synchronize()
            clock.tell("training", limit=clock.overtime() + 10)
            clock.start = time.monotonic()
        now = clock.elapsed()
        step, begin = (now - begin if begin >= 0 else 0.0), now
        if now + step * (2 if CUDA else 1) >= clock.budget:
            break
        if now - told >= 1:
            told = now
            clock.tell("progress", share=now / clock.budget, tokens_per_second=clock.seen / max(now, 1e-3))
        clock.steps += 1
        clock.seen += batch_size * seq_len
        yield batch[:, :-1], batch[:, 1:], now / clock.budget


# ---------------------------------------------------------------------------------------------------------------------
# 6  The metric: bits per byte of held-out text, and the probes that make it worth believing


class Invalid(Exception):
    """A run whose score would mean nothing. The text says why."""


def token_nats(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -ln p(y[i, t]) given x[i, :t+1]: two (B, T) int64 -> (B, T) float32, on the CPU.

    Raises Invalid when the logits are not what they have to be.
    """
    logits = model(x.to(DEVICE, copy=True))
    if type(logits) is not torch.Tensor:
        raise Invalid(f"the model returns {type(logits).__name__}, not a plain tensor of logits")
    if logits.shape != (*x.shape, VOCAB_SIZE) or not logits.is_floating_point():
        raise Invalid(f"the model returns {logits.dtype} {tuple(logits.shape)}, not floating-point logits "
                      f"{(*x.shape, VOCAB_SIZE)}")
    if not torch.isfinite(logits).all():
        raise Invalid("logits that are not finite")
    return cross_entropy(logits.float().flatten(0, 1), y.flatten().to(DEVICE), reduction="none").view(y.shape).cpu()


def splice(x: torch.Tensor, other: torch.Tensor, rng: np.random.Generator):
    """Make a probe of a batch: what may not matter is changed, and what may is kept.

    Every row keeps its tokens up to a cut of its own and goes on as a row of `other`; a quarter of the rows become
    wholly other rows; the rows change places. Returns (probe, order, cuts): row i of the probe was row order[i], and
    its first cuts[i] predictions have to be what they were. x, other, probe: (B, T) int64.
    """
    rows, length = x.shape
    order, cuts = torch.from_numpy(rng.permutation(rows)), torch.from_numpy(rng.integers(1, length, rows))
    cuts[:rows // 4] = 0
    keep = torch.arange(length) < cuts[:, None]
    return torch.where(keep, x[order], other[torch.from_numpy(rng.permutation(rows))]), order, cuts


class Probes:
    """Collects how much predictions changed where nothing that they may depend on had changed.

    The value at a cut is the one to watch: it is the last prediction before the text goes on differently, so a model
    that sees anything of the future at all loses all of it there. Tolerances, in nats per token:
    """

    AT_CUT = 0.05       # mean change at the cuts. Looking ahead by one token changes about 3
    BIAS = 0.005        # mean change everywhere: rounding errors cancel, an advantage does not; 0.002 bpb
    SPREAD = 0.02       # mean absolute change everywhere: bf16 with another order of sums (experts) makes under 0.01

    def __init__(self):
        self.change: list[torch.Tensor] = []
        self.at_cut: list[torch.Tensor] = []

    def compare(self, before: torch.Tensor, after: torch.Tensor, order: torch.Tensor, cuts: torch.Tensor):
        """Take in one probe. before, after: (B, T) nats of the batch and of its probe; order, cuts: from splice()."""
        change = (after - before[order]).double()
        self.change.append(change[torch.arange(change.shape[1]) < cuts[:, None]])
        kept = cuts > 0
        self.at_cut.append(change[kept, cuts[kept] - 1])

    def verdict(self):
        """Raise Invalid if any batch changed by more than rounding."""
        for change, at_cut in zip(self.change, self.at_cut):
            cut, bias, spread = at_cut.mean().item(), change.mean().item(), change.abs().mean().item()
            if abs(cut) > self.AT_CUT or abs(bias) > self.BIAS or spread > self.SPREAD:
                raise Invalid(f"leak: predictions change when only later tokens, other rows of the batch and earlier "
                              f"calls change (by {cut:+.3f} nats at the last token before the change, {bias:+.4f} "
                              f"anywhere, {spread:.4f} in size); logits at t may depend on tokens[:t+1] of their row "
                              f"alone")


@torch.no_grad()
def evaluate(model: torch.nn.Module, splits: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, float]:
    """Return {split: bits per byte} of the model for flat arrays of tokens; lengths: bytes per token.

    Bits per byte = sum of -log2 p(token) / sum of the token's bytes, both over tokens that have bytes (END has none).
    The same windows in the same batches for every candidate. Probes look exactly like evaluation and stand at random
    places in it, the first and the last call among them, so that a leak that begins late or needs full batches shows
    as well. Raises Invalid.
    """
    rng = np.random.default_rng()       # not seeded by the run: no candidate can know where the probes are
    model.eval()
    todo: dict[tuple[str, int], tuple] = {}     # (split, batch) -> x, y: (EVAL_ROWS, SEQ_LEN) int64
    for split, tokens in splits.items():
        count = min(EVAL_WINDOWS, (len(tokens) - 1) // SEQ_LEN) // EVAL_ROWS
        size = count * EVAL_ROWS * SEQ_LEN
        x, y = (torch.from_numpy(tokens[i:i + size].astype(np.int64)).view(count, EVAL_ROWS, SEQ_LEN) for i in (0, 1))
        todo |= {(split, b): (x[b], y[b]) for b in range(count)}
    keys = list(todo)
    probed = [keys[i] for i in rng.permutation(len(keys))[:max(2, round(PROBE_SHARE * len(keys)))]]
    middle = [(key, False) for key in keys] + [(key, True) for key in probed[2:]]
    calls = [(probed[0], True), *(middle[i] for i in rng.permutation(len(middle))), (probed[1], True)]

    nats: dict[tuple[str, int], torch.Tensor] = {}
    found: list[tuple] = []
    for key, is_probe in calls:
        x, y = todo[key]
        if is_probe:
            probe, order, cuts = splice(x, todo[keys[rng.integers(len(keys))]][0], rng)
            found.append((key, token_nats(model, probe, y[order]), order, cuts))
        else:
            nats[key] = token_nats(model, x, y)
    probes = Probes()
    for key, after, order, cuts in found:
        probes.compare(nats[key], after, order, cuts)
    probes.verdict()

    bpb = {}
    for split in splits:
        size = torch.from_numpy(lengths)[torch.cat([todo[k][1] for k in keys if k[0] == split])]
        total = torch.cat([nats[k] for k in keys if k[0] == split]).double()[size > 0].sum().item()
        bpb[split] = total / math.log(2) / size.sum().item()
    return bpb


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer: Tokenizer, prompt: list[int], count: int = 64) -> str:
    """Return the text of `prompt` continued by `count` tokens, drawn at temperature 0.8."""
    tokens, at = torch.full((1, SEQ_LEN), END), len(prompt)
    tokens[0, :at] = torch.tensor(prompt)
    for at in range(at, at + count):    # always a whole window: what is behind `at` cannot matter
        logits = model(tokens.to(DEVICE))[0, at - 1].float().cpu()
        tokens[0, at] = torch.multinomial(torch.softmax(logits / 0.8, 0), 1)
    return tokenizer.decode(tokens[0, :at + 1].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# 7  One run: a fresh process, whose main is this file and never the candidate


def load_candidate(path: Path) -> types.ModuleType:
    """Import a train.py under the name `candidate`. Its `import prepare` gets a module of only what it may use.

    What it may put in the place of prepare.batches, or of anything, it puts there for itself alone.
    """
    face = types.ModuleType("prepare", "what a train.py may use of prepare.py")
    face.DEVICE, face.SEQ_LEN, face.VOCAB_SIZE, face.batches = DEVICE, SEQ_LEN, VOCAB_SIZE, batches
    sys.modules["prepare"] = face
    spec = importlib.util.spec_from_file_location("candidate", path)
    module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_memory_mb() -> float:
    """Return the most memory this process has held: of the GPU if there is one, else of the machine."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(path: Path, seed: int, budget: float, folder: Path, tell: callable, began: float) -> dict:
    """Train and evaluate the train.py at `path` once. Returns what is reported; raises Invalid, or what train() does."""
    global _clock
    data = {split: np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r") for split in SPLITS}
    tokenizer = Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    clock = _clock = Clock(data["train"], seed, budget, tell)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = load_candidate(path).train()
    synchronize()
    if clock.start is None:
        raise Invalid("train() returned without drawing a batch from prepare.batches()")
    train_seconds = clock.elapsed()
    if train_seconds > clock.overtime():
        raise Invalid(f"overtime: train() returned {train_seconds:.1f} s after its first batch; the budget is "
                      f"{budget:g} s and nothing may follow the last batch")
    if not isinstance(model, torch.nn.Module):
        raise Invalid(f"train() returned {type(model).__name__}, not a torch.nn.Module")
    tell("evaluation", limit=EVAL_LIMIT)
    memory, now = peak_memory_mb(), time.monotonic()
    bpb = evaluate(model, {"val": data["val"], "test": data["test"]}, tokenizer.lengths())
    report = {"val_bpb": bpb["val"], "test_bpb": bpb["test"], "train_seconds": train_seconds,
              "startup_seconds": clock.start - began, "eval_seconds": time.monotonic() - now,
              "total_seconds": time.monotonic() - began, "peak_memory_mb": memory, "num_steps": clock.steps,
              "num_tokens": clock.seen, "num_params": sum(p.numel() for p in model.parameters())}
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
data:             {folder.name}""")
    text = sample(model, tokenizer, data["val"][:min(24, SEQ_LEN // 2)].tolist(), min(64, SEQ_LEN // 2))
    print(f"sample:           {text[:240]!r}", flush=True)
    return report


def process_start() -> float:
    """Return when this process began, on the clock of time.monotonic(); where that is not known, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return time.monotonic()


def one_run(path: Path, seed: int, budget: float, folder: Path, key: str | None) -> int:
    """Measure a train.py and return the exit code. What counts goes out as lines that begin with `key`.

    `key` is a secret of this run, on the command line since that passes through every launcher. The candidate is
    imported after it is gone from sys.argv, so what it prints cannot be taken for a report.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)

    def tell(event: str, **values):
        if key:
            out.write(f"\n{key} {json.dumps({'event': event, **values})}\n")

    meta = json.loads((folder / "meta.json").read_text())
    gpu = torch.cuda.get_device_name() if CUDA else DEVICE
    tell("setup", limit=SETUP_LIMIT, device=gpu, budget=budget, data=meta["name"], sha256=meta["sha256"],
         seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
    try:
        measure(path, seed, budget, folder, tell, process_start())
        return 0
    except BaseException as error:      # SystemExit from the candidate is no way out either
        if not isinstance(error, Invalid):
            traceback.print_exc()
        reason = str(error) if isinstance(error, Invalid) else f"{type(error).__name__}: {error}"
        tell("crash", reason=reason)
        print(f"autoresearch: this run is invalid: {reason}", file=sys.stderr, flush=True)
        return 1


def prepared() -> Path:
    """Return the folder that was prepared last; prepare the default data where there is none."""
    current = CACHE / "current"
    return CACHE / current.read_text() if current.exists() else prepare_or_fall_back(None)


def by_hand(path: str):
    """Run the train.py at `path` as the driver would, for a person: `python train.py`."""
    raise SystemExit(one_run(Path(path).resolve(), 0, BUDGET, prepared(), None))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="stdlib, tinystories, c4[:SHARDS], or a file or folder of text")
    parser.add_argument("--run", metavar="TRAIN_PY", type=Path, help="train and measure this file once")
    parser.add_argument("--seed", type=int, default=0, help="with --run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="with --run: seconds of training (%(default)s)")
    parser.add_argument("--folder", type=Path, help="with --run: a prepared folder, instead of the last one")
    parser.add_argument("--key", help="with --run: begin lines for the driver with this")
    args = parser.parse_args()
    del sys.argv[1:]
    if args.run:
        if not args.run.exists():
            fail(f"--run {args.run}: no such file")
        raise SystemExit(one_run(args.run.resolve(), args.seed, args.budget, args.folder or prepared(), args.key))
    try:
        prepare_or_fall_back(args.data)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename or CACHE}; AUTORESEARCH_CACHE names another place for data")


if __name__ == "__main__":
    main()
