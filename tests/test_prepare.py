"""What prepare.py promises of its data: documents, downloads, the tokenizer, tokens on disk."""

import collections
import doctest
import errno
import functools
import gzip
import http.server
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import requests

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

SIZE = 1_300_000        # characters: enough for a score on a CPU, the setting of all tests
BINS = [f"{split}.bin" for split in prepare.SPLITS]


def start(cache: Path, *command: str, hub: str = "http://127.0.0.1:9", **more) -> subprocess.Popen:
    """Start `python prepare.py ...`, or `python -c ...`, with its data in `cache`."""
    script = [] if command[:1] == ("-c",) else ["prepare.py"]
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "HF_ENDPOINT": hub}
    return subprocess.Popen([sys.executable, *script, *command], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process. Returns (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def bins(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in BINS]


def folder_in(cache: Path) -> Path:
    return cache / (cache / "current").read_text()


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """Distinct documents, SIZE characters in all, none of them long, out of the Python sources."""
    text, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        whole = path.read_text(encoding="utf-8", errors="replace")
        text += [f"# {path.name}\n{whole[i:i + 4000]}" for i in range(0, len(whole) - 99, 4000)]
        size += len(whole)
        if size > SIZE:
            break
    return text


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """A cache of its own for what runs in this process."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# --------------------------------------------------------------------------------------------------
# A stand-in for the hub: an HTTP server on loopback with the hub's addresses, and faults on demand


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files`, {address: bytes}; `faults` is consumed, {address: [one a request]}."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.faults: dict[str, list[str]] = collections.defaultdict(list)
        self.asked: list[tuple[str, int]] = []      # (address, first byte)
        self.pause = 0.0                            # seconds between 16 kB
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, data = self.server, self.server.files.get(self.path)
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        hub.asked.append((self.path, first))
        fault = hub.faults[self.path].pop(0) if hub.faults[self.path] else ""
        if fault == "empty":
            data = b""
        if data is None or fault.isdigit():
            return self.send_error(int(fault or 404))
        if first >= len(data) and first:
            return self.send_error(416)
        if fault == "no ranges":
            first = 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        body = data[first:]
        if fault == "drop":
            body = body[:len(body) // 2]
        for i in range(0, len(body), 1 << 14):
            self.wfile.write(body[i:i + (1 << 14)])
            time.sleep(hub.pause)
        self.close_connection = True

    def handle(self):
        try:
            super().handle()
        except ConnectionError:     # whoever asked was killed
            pass

    def log_message(self, *args):
        pass


STORIES = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"
SHARD = "/datasets/allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"


@pytest.fixture(scope="session")
def served(stories) -> dict[str, bytes]:
    """What the hub has: {address: content}."""
    files = {STORIES: "<|endoftext|>".join(stories).encode()}
    for i in range(4):      # two documents of the first shard come again in the second
        texts = stories[:8:4] * (i == 1) + stories[i::4]
        lines = "".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in texts)
        files[SHARD.format(i)] = gzip.compress(lines.encode(), 0)
    return files


@pytest.fixture(scope="session", autouse=True)
def fallback(tmp_path_factory) -> subprocess.Popen:
    """A preparation of the default data, at work beside the other tests, where it cannot be had."""
    hub = Hub({})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return start(tmp_path_factory.mktemp("cache"), "-c", "import os, prepare\n"
                 "prepare.DEFAULT_DATA = 'c4'\n"
                 "if __name__ == '__main__':\n"
                 "    print(prepare.prepare_or_fall_back(None), sum(os.times()[:4]), sep='\\n')",
                 hub=hub.url)


@pytest.fixture
def hub(served):
    hub = Hub(dict(served))
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="session")
def c4(served, tmp_path_factory) -> Path:
    """The folder of four shards of C4 that were prepared without any disturbance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHE", tmp_path_factory.mktemp("cache"))
        (prepare.CACHE / "downloads").mkdir()
        for address, content in served.items():
            (prepare.CACHE / "downloads" / Path(address).name).write_bytes(content)
        return prepare.prepare("c4:4")


def remote(hub: Hub, address: str, folder: Path) -> Path:
    return prepare.download(hub.url + address, folder / Path(address).name)


@pytest.mark.parametrize("faults", [["503"], ["drop"], ["drop", "503"] * 4, ["drop", "no ranges"],
                                    ["429"], ["empty"]], ids=" then ".join)
def test_a_download_outlives_what_a_network_does(hub, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    hub.faults[STORIES] = list(faults)
    assert remote(hub, STORIES, tmp_path).read_bytes() == hub.files[STORIES]
    assert len(hub.asked) == 1 + sum(fault != "no ranges" for fault in faults)
    assert not list(tmp_path.glob("*.part"))


def test_a_download_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    hub.faults[STORIES] = ["drop"]
    remote(hub, STORIES, tmp_path)
    half = len(hub.files[STORIES]) // 2
    assert [address for address, _ in hub.asked] == [STORIES] * 2
    assert half - (1 << 16) <= hub.asked[1][1] <= half


def test_a_download_that_was_stopped_just_before_its_end_is_whole(hub, tmp_path):
    (tmp_path / (Path(STORIES).name + ".part")).write_bytes(hub.files[STORIES])
    assert remote(hub, STORIES, tmp_path).read_bytes() == hub.files[STORIES]


def test_a_download_that_brings_nothing_is_given_up_and_keeps_what_came(hub, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(prepare.time, "sleep", pauses.append)
    hub.faults[STORIES] = ["drop"] + ["503"] * 99
    with pytest.raises(requests.HTTPError):
        remote(hub, STORIES, tmp_path)
    assert len(hub.asked) == prepare.TRIES and pauses == sorted(pauses)
    part = tmp_path / (Path(STORIES).name + ".part")
    assert 0 < part.stat().st_size < len(hub.files[STORIES]) and not part.with_suffix("").exists()


def test_a_refusal_is_not_tried_again(hub, tmp_path):
    with pytest.raises(requests.HTTPError, match="404"):
        remote(hub, "/datasets/none", tmp_path)
    assert len(hub.asked) == 1


def test_tinystories_and_c4_have_the_documents_of_their_files(hub, cache, monkeypatch, stories, c4):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for folder, name in (prepare.prepare("tinystories"), "tinystories"), (c4, "c4-4"):
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["name"] == name and meta["documents"] == len(stories)
        tokens = [np.fromfile(folder / name, np.uint16) for name in BINS]
        decode = prepare.Tokenizer(json.loads((folder / "tokenizer.json").read_text())).decode
        texts = [decode(some) for all_ in tokens
                 for some in np.split(all_, np.flatnonzero(all_ == prepare.END) + 1)[:-1]]
        assert sorted(texts) == sorted(stories)
    assert len(hub.asked) == 1


# --------------------------------------------------------------------------------------------------
# Documents


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_folder_is_read_without_what_is_not_text_and_says_so(cache, tmp_path, capsys):
    good = write(tmp_path / "in" / "sub" / "good.txt", "good")
    write(tmp_path / "in" / ".hidden" / "text", "hidden")
    write(tmp_path / "in" / "empty", "")
    (tmp_path / "in" / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert prepare.source(str(tmp_path / "in"))[1] == [good]
    assert "skipped 2 of 3 files" in capsys.readouterr().out    # a pipe or a broken link is no file


def test_the_name_of_a_folder_of_text_changes_with_its_content_alone(tmp_path):
    first, second = write(tmp_path / "in" / "a", "one"), write(tmp_path / "in" / "b", "two")
    names = [prepare.source(str(tmp_path / "in"))[0]]
    os.utime(first, (0, 0))
    names.append(prepare.source(str(tmp_path / "in"))[0])
    write(second, "2wo")
    names.append(prepare.source(str(tmp_path / "in"))[0])
    write(first, "one2")
    write(second, "wo")         # the same bytes in all, but other documents
    names.append(prepare.source(str(tmp_path / "in"))[0])
    assert names[0] == names[1] and len(set(names)) == 3


def test_a_text_is_cut_into_pieces_that_make_it_up_again(tmp_path, stories):
    for text in "\r\n".join(stories[:100]), "x" * 300_000, "é\r" * 100_000, "":
        pieces = list(prepare.text_pieces(write(tmp_path / "text", text)))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 3 * prepare.PIECE


def test_endoftext_separates_documents(tmp_path):
    path = write(tmp_path / "text", "one<|endoftext|>two<|endoftext|>\n<|endoftext|>three")
    assert list(prepare.text_pieces(path)) == ["one", "two", "\n", "three"]


@pytest.mark.parametrize("kind", ["one line", "lines", "gzip"])
def test_a_file_is_streamed_and_never_held_whole(tmp_path, kind):
    path, reader = tmp_path / "file", prepare.json_texts if kind == "gzip" else prepare.text_pieces
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with (gzip.open(path, "wt", 1) if kind == "gzip" else path.open("w")) as file:
        for _ in range(2000):
            file.write(line if kind != "one line" else line[:-1])
    tracemalloc.start()
    size = sum(map(len, reader(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size >= 20_000_000 and peak < 2_000_000


def test_near_empty_and_repeated_documents_are_dropped(tmp_path, stories):
    text = "<|endoftext|>".join([*stories[:50], " " * 99, "short", *stories[:50]])
    files = [write(tmp_path / "a", text), write(tmp_path / "b", text)]
    kept = [text for _, text in prepare.documents(files, prepare.text_pieces, 0.1)]
    assert kept == [text for text in stories[:50] if len(text) >= prepare.SHORTEST]


def test_each_split_has_its_share_from_all_over_the_text(tmp_path, stories):
    path = write(tmp_path / "text", "<|endoftext|>".join(stories))
    found = list(prepare.documents([path], prepare.text_pieces, 0.06))
    assert found == list(prepare.documents([path], prepare.text_pieces, 0.06))
    total = sum(len(text) for _, text in found)
    for split, share in ("train", 0.88), ("val", 0.06), ("test", 0.06):
        size = sum(len(text) for which, text in found if which == split)
        assert abs(size - share * total) <= 4100
        tenths = {i * 10 // len(found) for i, (which, _) in enumerate(found) if which == split}
        assert tenths == set(range(10))


# --------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="session")
def tokenizer(stories) -> prepare.Tokenizer:
    texts = [*stories[:60], *(any_text(seed) for seed in range(60))]
    return prepare.Tokenizer(prepare.learn_merges(texts, prepare.VOCAB_SIZE - 257))


EXACT = "utf-8", "surrogatepass"        # a lone surrogate is no UTF-8, but text may have it


def any_text(seed: int, size: int = 400) -> str:
    """Characters of all kinds, half of them hard ones: lone surrogates, joiners, line ends."""
    rng = random.Random(seed)
    few = " \t\r\n\0aé漢🙂\ud83d\u0301\u200d\xa0²٣_'."
    return "".join(rng.choice(few) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
                   for _ in range(size))


@pytest.mark.parametrize("text", ["", "a", "\r\n\r\n", "\ufeff x", " " * 999, "x" * 999, "🙂" * 99,
                                  *map(any_text, range(100, 150))],
                         ids=lambda text: f"{len(text)} characters")
def test_decode_is_the_inverse_of_encode_and_the_metric_counts_its_bytes(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.bytes[token] for token in tokens).decode(*EXACT) == text
    assert tokenizer.lengths()[tokens].sum() == len(text.encode("utf-8", "surrogatepass"))


def test_bytes_are_exact_where_a_token_ends_inside_a_character():
    """Each of these tokens alone decodes to replacement characters, of other lengths."""
    tokenizer = prepare.Tokenizer([(0x20, 0xC3), (0xF0, 0x9F), (256, 0xA9)])
    tokens = tokenizer.encode(" é è 🙂")
    assert tokens == [258, 256, 0xA8, 0x20, 257, 0x99, 0x82]
    assert tokenizer.lengths()[tokens].tolist() == [3, 2, 1, 1, 2, 1, 1]
    assert [len(tokenizer.decode([t]).encode()) for t in tokens] != [3, 2, 1, 1, 2, 1, 1]
    assert tokenizer.decode(tokens) == " é è 🙂"


def test_the_end_of_a_document_stands_for_no_bytes(tokenizer):
    assert tokenizer.lengths().shape == (prepare.VOCAB_SIZE,)
    assert tokenizer.lengths()[prepare.END] == 0
    assert tokenizer.decode([104, prepare.END, 105]) == "hi"


@pytest.mark.parametrize("text", [
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",                      # Hindi
    "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48 \u0e01\u0e33",                            # Thai
    "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0b8e\u0bb4\u0bc1\u0ba4\u0bcd\u0ba4\u0bc1",      # Tamil
    "\u0643\u064e\u062a\u064e\u0628\u064e \u0643\u0650\u062a\u064e\u0627\u0628\u064c", # Arabic
    "de\u0301veloppement a\u0300"], ids=["Hindi", "Thai", "Tamil", "Arabic", "French"])
def test_a_letter_and_its_combining_marks_stay_in_one_word(text):
    assert [word.strip() for word in re.findall(prepare.WORD, text)] == text.split()


@pytest.mark.parametrize("text", [*map(any_text, range(20)), "a\u0301" * 99, "a" + "\u0301" * 99],
                         ids=lambda text: f"{len(text)} characters")
def test_every_character_is_in_exactly_one_word_of_bounded_length(text):
    words = re.findall(prepare.WORD, text)
    assert "".join(words) == text and max(map(len, words)) <= 1 + 32 * 5


def test_merges_are_those_of_counting_all_pairs_anew_each_time(stories):
    text = "".join(stories[:3]) + "aaaaaaa abababab aaab" * 9
    words = [tuple(word.encode()) for word in re.findall(prepare.WORD, text)]
    expected = []
    for token in range(256, 456):
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        expected.append(best)
        words = [tuple(prepare.join(list(word), best, token)) for word in words]
    assert prepare.learn_merges([text], 200) == expected


def test_joining_goes_from_the_left_and_never_overlaps():
    assert prepare.join([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert prepare.join([1, 2, 1, 2, 2], (1, 2), 9) == [9, 9, 2]


def test_tokens_are_those_of_tiktoken_with_the_same_merges(tokenizer, stories):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {tokenizer.bytes[i]: i for i in range(256 + len(tokenizer.rank))}
    other = tiktoken.Encoding("same", pat_str=prepare.WORD, mergeable_ranks=ranks,
                              special_tokens={})
    for text in [*stories, "Größe, naïve café; 漢字かな 🙂🙃 \r\n\t x²"]:
        assert tokenizer.encode(text) == other.encode_ordinary(text)


def test_no_input_makes_encoding_slow(tokenizer):
    begin = time.process_time()
    for character in "a1. \né\u0301":
        tokenizer.encode(character * 200_000)
    assert time.process_time() - begin < 5


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(prepare).attempted >= 1 and doctest.testmod(prepare).failed == 0


# --------------------------------------------------------------------------------------------------
# Tokens on disk, and the command


@pytest.fixture(scope="session")
def texts(stories, tmp_path_factory) -> Path:
    """A folder of text of one's own, with the line ends of Windows and characters of two bytes."""
    folder = tmp_path_factory.mktemp("texts")
    write(folder / "one", "\r\n".join(stories[::2]))
    write(folder / "two", "".join(stories[1::2]).replace("e", "é"))
    return folder


@pytest.fixture(scope="session")
def own(texts, tmp_path_factory) -> Path:
    """The folder of those texts, prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHE", tmp_path_factory.mktemp("cache"))
        return prepare.prepare(str(texts))


@pytest.fixture(scope="session")
def embedded(fallback) -> tuple[Path, float, str, str]:
    """How that ended: (folder, seconds of all cores, stdout, stderr)."""
    code, out, err = end(fallback)
    assert code == 0, err
    *out, folder, seconds = out.splitlines()
    return Path(folder), float(seconds), "\n".join(out), err


def test_default_data_that_cannot_be_had_is_replaced_loudly(embedded):
    folder, _, out, err = embedded
    warning = [line for line in err.splitlines() if line.startswith("WARNING: c4 cannot be down")]
    assert len(warning) == 1 and "404" in warning[0] and "prepare.py --data c4" in warning[0]
    assert re.search(r"^stdlib-\w+: .* bytes per token; ready in", out, re.M)
    assert folder.name.startswith("stdlib-") and folder == folder_in(folder.parent)


def test_the_embedded_data_is_ready_within_30_seconds(embedded):
    assert embedded[1] < 30


def test_data_asked_for_by_name_is_never_replaced(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.files.clear()
    code, line = stop(prepare.prepare_or_fall_back, "c4")
    assert code == 1 and "--data c4 cannot be downloaded" in line and "--data stdlib" in line
    assert not (cache / "current").exists()


def test_files_of_tokens_hold_exactly_the_documents(texts, own):
    folder = own
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = prepare.Tokenizer(json.loads((folder / "tokenizer.json").read_text()))
    kept = list(prepare.documents(sorted(texts.iterdir()), prepare.text_pieces, 0.06))
    count = 0
    for split in prepare.SPLITS:
        tokens = np.memmap(folder / f"{split}.bin", np.uint16, "r")
        parts = np.split(tokens, np.flatnonzero(tokens == prepare.END) + 1)
        assert parts.pop().size == 0
        assert [tokenizer.decode(part) for part in parts] == [t for s, t in kept if s == split]
        count += len(tokens) - len(parts)
    size = sum(len(text.encode()) for _, text in kept)
    assert meta["documents"] == len(kept) and meta["text_mb"] == pytest.approx(size / 1e6, abs=1e-3)
    assert meta["bytes_per_token"] == pytest.approx(size / count, abs=1e-4)
    assert meta["train_tokens"] == (folder / "train.bin").stat().st_size // 2


def test_what_is_prepared_is_not_made_again(c4, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", c4.parent)
    monkeypatch.setattr(prepare, "download", lambda url, path: path)
    times = [(c4 / name).stat().st_mtime_ns for name in (*BINS, "meta.json")]
    assert prepare.prepare("c4:4") == c4
    assert times == [(c4 / name).stat().st_mtime_ns for name in (*BINS, "meta.json")]


def test_a_preparation_that_was_killed_goes_on(hub, c4, tmp_path):
    """kill -9 during a download, Ctrl-C and kill -9 while it encodes; then as if undisturbed."""
    command, hub.pause = ("--data", "c4:4"), 0.01
    download = tmp_path / "downloads" / (Path(SHARD.format(1)).name + ".part")
    half = tmp_path / f"{c4.name}.part"
    for path, kill in ((download, signal.SIGKILL), (half / "tokenizer.json", signal.SIGINT),
                       (half / "tokenizer.json", signal.SIGKILL)):
        process = start(tmp_path, *command, hub=hub.url)
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        process.send_signal(kill)
        code, _, err = end(process)
        assert code == (1 if kill == signal.SIGINT else -kill), err
        assert kill == signal.SIGKILL or err.splitlines()[-1].startswith("prepare.py: stopped")
        assert not (tmp_path / c4.name).exists()
    code, _, err = end(start(tmp_path, *command, hub=hub.url))
    assert code == 0, err
    assert bins(folder_in(tmp_path)) == bins(c4)
    assert any(first > 0 for _, first in hub.asked)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"<html>" + data,
                                    lambda data: gzip.compress(b"{}\n")],
                         ids=["cut off", "not gzip", "without text"])
def test_a_corrupt_shard_is_named_and_deleted(hub, cache, monkeypatch, c4, damage):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(prepare, "SAMPLE", 1000)        # the damage shows when it is encoded
    monkeypatch.setattr(prepare, "TRIES", 1)
    address = SHARD.format(3)
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / Path(address).name).write_bytes(damage(hub.files[address]))
    code, line = stop(prepare.prepare_or_fall_back, "c4:4")
    assert code == 1 and "00003-of-01024.json.gz was corrupt" in line and "again" in line
    assert not (cache / c4.name).exists()
    assert not (cache / "downloads" / Path(address).name).exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(cache, own, texts, monkeypatch, capsys, code):
    monkeypatch.setattr(prepare, "CACHE", own.parent)
    monkeypatch.setattr(prepare.fcntl, "flock", failing(OSError(code, os.strerror(code))))
    assert prepare.prepare(str(texts)) == own
    assert os.strerror(code) in capsys.readouterr().err


def test_another_trouble_with_a_lock_is_an_error(own, texts, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", own.parent)
    monkeypatch.setattr(prepare.fcntl, "flock", failing(OSError(errno.EIO, "I/O error")))
    assert "I/O error" in stop(prepare.prepare_or_fall_back, str(texts))[1]


def failing(error: Exception):
    def function(*args, **more):
        raise error
    return function


def test_without_fcntl_one_line_names_wsl2(tmp_path):
    code, _, err = end(start(tmp_path, "-c", "import sys; sys.modules['fcntl'] = None\n"
                             "import prepare"))
    assert code == 1 and len(err.splitlines()) == 1 and "WSL2" in err


# --------------------------------------------------------------------------------------------------
# GPUs, without one


@pytest.mark.parametrize("visible, count, printed", [
    (None, 0, ""), (None, 2, "0,1"), ("", 0, ""), ("-1", 0, ""), ("0,1", 2, "0,1"),
    ("GPU-ab,MIG-cd", 2, "GPU-ab,MIG-cd"), ("3,9,2", 1, "3")])
def test_devices_prints_the_names_of_what_torch_sees(monkeypatch, capsys, visible, count, printed):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(prepare.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--devices"])
    prepare.main()
    assert capsys.readouterr().out == printed + "\n"


def test_a_gpu_without_kernels_gets_one_line_with_both_versions(monkeypatch):
    cuda = prepare.torch.cuda
    monkeypatch.setattr(prepare, "CUDA", True)
    monkeypatch.setattr(prepare.torch, "ones", failing(RuntimeError("no kernel image\nmore")))
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    _, line = stop(prepare.check_card)
    assert all(part in line for part in ("(6, 1)", "sm_75", "no kernel", "CUDA_VISIBLE_DEVICES=-1"))


@pytest.mark.parametrize("device, visible, found, warns", [
    ("cpu", None, True, True), ("cpu", None, False, False), ("cpu", "-1", True, False),
    ("mps", None, True, False)])
def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch, capsys, device, visible, found,
                                                  warns):
    monkeypatch.setattr(prepare, "DEVICE", device)
    monkeypatch.setattr(prepare, "CUDA", False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: found and f"/usr/bin/{name}")
    prepare.check_card()
    assert ("cannot use the NVIDIA GPU" in capsys.readouterr().err) == warns


def test_a_gpu_holds_out_more_of_a_small_text(monkeypatch, cache, texts):
    shares = []
    monkeypatch.setattr(prepare, "documents", lambda files, reader, share: iter(shares.append(share)
                                                                              or ()))
    for cuda, share in (True, 0.08), (False, 0.06):
        monkeypatch.setattr(prepare, "CUDA", cuda)
        assert "too little text" in stop(prepare.prepare, str(texts))[1]
        assert shares.pop() == shares.pop() == share


def test_the_fallback_on_a_gpu_is_called_a_smoke_test(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "CUDA", True)
    monkeypatch.setattr(prepare, "prepare", lambda data: Path(data) if data == "stdlib" else
                        failing(requests.ConnectionError("no route"))())
    monkeypatch.setattr(prepare, "DEFAULT_DATA", "c4")
    assert prepare.prepare_or_fall_back(None) == Path("stdlib")
    assert "smoke test" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The command


def test_two_preparations_of_the_same_data_do_not_disturb_each_other(hub, c4, tmp_path):
    both = [start(tmp_path, "--data", "c4:4", hub=hub.url) for _ in range(2)]
    done = [end(process) for process in both]
    assert [code for code, _, _ in done] == [0, 0], done
    assert sum("training a tokenizer" in out for _, out, _ in done) == 1
    assert not list(tmp_path.glob("*.part"))
    assert bins(folder_in(tmp_path)) == bins(c4)
    assert len(hub.asked) == 4


def stop(function, *args) -> tuple[int, str]:
    """Call what has to end the process. Returns (exit code, its one line)."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    line = error.value.code
    assert isinstance(line, str) and line.startswith("prepare.py: ") and "\n" not in line
    return 1, line      # Python prints a text and exits with 1


@pytest.mark.parametrize("data", ["nonsense", "c4:0", "c4:1025", "c4:x", "stdlib:2", "/no/where"])
def test_a_name_that_means_nothing_gets_one_line_with_what_does(cache, data):
    _, line = stop(prepare.prepare_or_fall_back, data)
    assert f"--data {data}:" in line and "stdlib, tinystories, c4" in line


def test_too_little_text_says_how_much_is_needed_and_that_is_enough(cache, tmp_path, stories):
    whole = "".join(stories)
    path = write(tmp_path / "text", whole[:SIZE // 3])
    _, line = stop(prepare.prepare_or_fall_back, str(path))
    need = re.search(r"too little text in text-\w+: [\d.]+ MB, .* needs about ([\d.]+) MB", line)
    write(path, whole[:int(float(need[1]) * 1e6)])
    assert prepare.prepare_or_fall_back(str(path)).is_dir()


@pytest.mark.parametrize("text", ["short", "\n" * 999, "one document that is long enough " * 9])
def test_next_to_no_text_says_how_much_is_needed(cache, tmp_path, text):
    _, line = stop(prepare.prepare_or_fall_back, str(write(tmp_path / "text", text)))
    assert re.search(r"needs about \d+\.\d MB", line)


def test_a_folder_without_text_gets_one_line(cache, tmp_path):
    assert "no text in" in stop(prepare.prepare_or_fall_back, str(tmp_path))[1]


def test_a_cache_that_cannot_be_written_gets_one_line(monkeypatch, tmp_path, texts):
    monkeypatch.setattr(prepare, "CACHE", write(tmp_path / "file", "") / "cache")
    assert "AUTORESEARCH_CACHE" in stop(prepare.prepare_or_fall_back, str(texts))[1]


def test_a_disk_that_takes_no_more_gets_one_line(texts, cache):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = start(cache, "--data", str(texts), preexec_fn=limit)
    code, _, err = end(process)
    assert code == 1 and len(err.splitlines()) == 1 and "File too large" in err
    assert not (cache / "current").exists()


def test_bad_use_of_the_command_exits_with_2(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--date", "stdlib"])
    with pytest.raises(SystemExit, match="2"):
        prepare.main()
