"""What prepare.py promises of its data: documents, downloads, the tokenizer, tokens on disk.

Everything is small here: 150 kB of text, 512 tokens, windows of 32. What has to be a process of
its own is a fork of this one, since torch takes two seconds to import.
"""

import collections
import gzip
import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import requests
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VOCAB_SIZE": 512, "END": 511, "SEQ_LEN": 32}.items():
            patch.setattr(prepare, name, value)
        yield


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """run(*flags) is what `python prepare.py` prints with them, in this process."""
    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
        monkeypatch.setattr(sys, "orig_argv", [])
        monkeypatch.setattr(prepare.signal, "signal", Mock())       # Ctrl-C is for pytest here
        prepare.main()
        return "".join(capsys.readouterr())
    return run


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """refused(*flags) is the one line with which the command ends."""
    def refused(*flags: object) -> str:
        with pytest.raises(SystemExit) as end:
            run(*flags)
        line = end.value.code       # Python prints a text, and exits with 1
        assert line.startswith("prepare.py: ") and "\n" not in line
        return line
    return refused


def start(log: Path, *flags: object, before: Callable = int) -> multiprocessing.Process:
    """Start `python prepare.py` with `flags`, as a fork that leads a process group."""
    def child():
        os.setsid()
        sys.stdout = sys.stderr = log.open("w", 1)
        sys.argv = ["prepare.py", *map(str, flags)]
        before()
        prepare.main()

    process = FORK.Process(target=child)
    process.start()
    return process


def bins(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.bin").read_bytes() for split in prepare.SPLITS]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """Distinct documents of 600 characters, some with é, with the line ends of Windows or both."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text("utf-8", "replace") for path in library[:40])
    stories = [f"# {i}\n{text[i:i + 594]}" for i in range(0, 150_000, 594)]
    return [story.replace("e", "é" if i % 2 else "e").replace("\n", "\r\n" if i % 3 else "\n")
            for i, story in enumerate(stories)]


# Downloads, from a stand-in for the hub: its addresses on loopback, and faults on demand


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files`, {address: bytes}; `faults` is consumed, {address: [one a request]}."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.faults: dict[str, list[str]] = collections.defaultdict(list)
        self.asked: list[tuple[str, int]] = []      # (address, first byte)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        hub.asked.append((self.path, first))
        fault = hub.faults[self.path].pop(0) if hub.faults[self.path] else ""
        data = b"" if fault == "empty" else hub.files.get(self.path)
        if data is None or fault[:3].isdigit():
            self.send_response(int(fault or "404"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if first >= len(data) and first:
            return self.send_error(416)
        if fault == "no ranges":
            first = 0
        if fault == "page":
            first, data = 0, b"<!DOCTYPE html><title>Sign in</title>" + b" " * 400_000
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        body = data[first:]
        self.wfile.write(body[:len(body) // 2] if fault in ("drop", "stall") else body)
        if fault == "stall":
            self.connection.recv(1)     # returns when whoever asked is gone
        self.close_connection = True

    def log_message(self, *args):
        pass


STORIES = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"
SHARD = "/datasets/allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"


@pytest.fixture(scope="module")
def served(stories) -> dict[str, bytes]:
    """What the hub has: {address: content}."""
    files = {STORIES: ("<|endoftext|>" * 400).join(stories).encode()}
    for i in range(4):      # two documents of the first shard come again in the second
        texts = stories[:8:4] * (i == 1) + stories[i::4]
        lines = "".join(json.dumps({"text": text, "url": "-" * 20_000}) + "\n" for text in texts)
        files[SHARD.format(i)] = gzip.compress(lines.encode(), 0)
    return files


@pytest.fixture
def hub(served, monkeypatch) -> Iterator[Hub]:
    hub = Hub(dict(served))
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def c4(served, tmp_path_factory) -> Path:
    """The folder of four shards of C4 that were prepared without any disturbance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHE", tmp_path_factory.mktemp("cache"))
        (prepare.CACHE / "downloads").mkdir()
        for address, content in served.items():
            (prepare.CACHE / "downloads" / Path(address).name).write_bytes(content)
        return prepare.prepare("c4:4")


@pytest.mark.parametrize("faults", [["503"], ["429"], ["empty"], ["drop", "no ranges"], ["page"],
                                    ["drop", "page"], ["drop", "503"] * 2], ids=" then ".join)
def test_a_download_outlives_what_a_network_does(hub, monkeypatch, faults):
    monkeypatch.setattr(prepare, "sleep", lambda seconds: None)
    hub.faults[STORIES] = list(faults)
    assert prepare.source("tinystories")[1][0].read_bytes() == hub.files[STORIES]
    assert len(hub.asked) == 1 + sum(fault != "no ranges" for fault in faults)
    if "drop" in faults:        # goes on where it stopped, but for a last chunk
        half = len(hub.files[STORIES]) // 2
        assert half - (1 << 16) <= hub.asked[1][1] <= half


def test_a_download_that_brings_nothing_is_given_up_and_keeps_what_came(hub, cache, monkeypatch):
    pauses = []
    monkeypatch.setattr(prepare, "sleep", pauses.append)
    hub.faults[STORIES] = ["drop"] + ["503"] * 4
    with pytest.raises(requests.HTTPError):
        prepare.source("tinystories")
    assert len(hub.asked) == 5 and pauses == [1, 4, 16, 64]
    [part] = (cache / "downloads").iterdir()
    assert part.suffix == ".part" and 0 < part.stat().st_size < len(hub.files[STORIES])
    part.write_bytes(hub.files[STORIES])        # as if it was stopped just before its end
    assert prepare.source("tinystories")[1][0].read_bytes() == hub.files[STORIES]


def test_a_web_page_never_becomes_the_data(hub, cache, monkeypatch):
    monkeypatch.setattr(prepare, "sleep", lambda seconds: None)
    for address, data in (STORIES, "tinystories"), (SHARD.format(0), "c4:1"):
        hub.faults[address] = ["drop"] + ["page"] * 4
        with pytest.raises(requests.ConnectionError, match="a web page came"):
            prepare.source(data)
        [part] = (cache / "downloads").iterdir()
        assert hub.files[address].startswith(part.read_bytes()) and part.stat().st_size
        part.unlink()


def test_the_hub_has_the_same_address_with_a_slash_at_its_end(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f" {hub.url}// ")
    prepare.source("tinystories")
    assert hub.asked == [(STORIES, 0)]


def test_a_name_means_its_data_set_also_beside_a_folder_of_that_name(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = write(tmp_path / "c4:1" / "text", "one")
    assert prepare.source("c4:1")[0] == "c4-1" and hub.asked == [(SHARD.format(0), 0)]
    assert prepare.source("./c4:1")[1] == [text.relative_to(tmp_path)]


def test_data_that_cannot_be_downloaded_get_one_line_that_names_what_needs_no_network(
        hub, refused, cache, monkeypatch):
    monkeypatch.setattr(prepare, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "DEFAULT_DATA", "c4")
    hub.files.clear()
    for flags in ["--data", "c4"], []:
        assert re.search("404 .*c4-train.*--data python needs no network", refused(*flags))
    assert not (cache / "current-v512").exists()


def test_python_is_what_an_installation_has_without_tests_and_stays_the_default(
        run, cache, stories, monkeypatch, tmp_path):
    write(tmp_path / "lib" / "tests" / "other.py", "x = 1")     # not every Python comes with it
    write(tmp_path / "torch" / "testing" / "tables.py", "x = 1")
    names = "lib/os.py", "torch/__init__.py", "numpy/__init__.py"
    files = [write(tmp_path / name, f"# {name}\n" + "".join(stories)) for name in names]
    for module, file in zip((os, prepare.torch, prepare.np), files):
        monkeypatch.setattr(module, "__file__", str(file))
    assert prepare.source("stdlib")[1] == files[:1] and prepare.source("python")[1] == files
    assert re.search(r"^python-\w+: .* bytes per token$", said := run("--data", "python"), re.M)
    folder = f"{cache / (cache / 'current-v512').read_text()}\n"
    assert said.endswith(folder) and run() == folder, "the second time it is there"


def test_a_corrupt_shard_is_named_and_fetched_again(hub, cache, run, refused, c4):
    address = SHARD.format(3)
    shard, data = cache / "downloads" / Path(address).name, hub.files[address]
    for damaged in data[:-9], b"<html>" + data, gzip.compress(b"{}\n"):     # the last has no text
        shard.write_bytes(damaged)
        with pytest.raises(SystemExit, match=f"{shard.name} is corrupt .*delete it"):
            list(prepare.json_texts(shard))
    assert f"{shard.name} is corrupt" in refused("--data", "c4:4")
    assert not (cache / c4.name).exists()
    shard.unlink()
    run("--data", "c4:4")
    assert bins(cache / c4.name) == bins(c4)


def test_a_folder_is_read_without_what_is_not_text_and_its_name_changes_with_its_content(
        tmp_path, capsys):
    def name(first: str, second: str) -> str:
        good = [write(tmp_path / "in" / "a", first), write(tmp_path / "in" / "sub" / "b", second)]
        name, files, _ = prepare.source(str(tmp_path / "in"))
        assert files == good
        said = capsys.readouterr().out
        assert "skipped 8 of 10 files" in said and "links to folders, or not UTF-8" in said
        return name

    write(tmp_path / "elsewhere" / "text", "text")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "text.gz").write_bytes(gzip.compress(b"text"))
    with zipfile.ZipFile(tmp_path / "in" / "text.zip", "w") as archive:
        archive.writestr("text", "text")
    (tmp_path / "in" / "utf-16").write_bytes("text".encode("utf-16-le"))        # valid UTF-8

    write(tmp_path / "in" / ".hidden" / "text", "hidden")
    write(tmp_path / "in" / "empty", "")
    (tmp_path / "in" / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    # the last two have the same bytes in all, but other documents
    assert len({name("one", "two"), name("one", "2wo"), name("one2", "wo")}) == 3
    assert name("one", "two") == name("one", "two")


def test_a_text_is_cut_where_it_says_so_and_into_pieces_that_make_it_up_again(tmp_path, stories):
    def pieces(text: str) -> list[str]:
        _, [file], reader = prepare.source(str(write(tmp_path / "text", text)))
        return list(reader(file))

    assert pieces("one<|endoftext|>two<|endoftext|>\n<|endoftext|>") == ["one", "two", "\n", ""]
    for at in range(-14, 2):        # the mark stands across the end of a chunk, in a long line
        texts = ["a" * (2 * prepare.PIECE + at), "b" * 99]
        assert "<" not in "".join(pieces("<|endoftext|>".join(texts)))
    for text in "\r\n".join(stories), "x" * 300_000, "é\r" * 100_000:
        assert "".join(pieces(text)) == text and len(pieces(text)) > 2
        assert max(map(len, pieces(text))) <= 60_000


def test_each_split_has_its_share_from_all_over_the_text_and_nothing_twice(tmp_path, stories):
    write(tmp_path / "in" / "a", "<|endoftext|>".join([*stories, " " * 99, "short", *stories[:50]]))
    write(tmp_path / "in" / "b", "<|endoftext|>".join(stories[50:]))
    data = prepare.source(str(tmp_path / "in"))[1:]
    found = list(prepare.documents(*data, 0.06))
    assert found == list(prepare.documents(*data, 0.06))
    assert [text for _, text in found] == stories
    total = sum(map(len, stories))
    for split, share in ("train", 0.88), ("val", 0.06), ("test", 0.06):
        size = sum(len(text) for which, text in found if which == split)
        assert abs(size - share * total) <= 1300        # two documents
        tenths = {i * 10 // len(found) for i, (which, _) in enumerate(found) if which == split}
        assert tenths == set(range(10))


def test_of_many_files_each_is_whole_in_one_split(tmp_path, stories):
    """A file repeats itself: what stands in train would help with its other half in val."""
    for i in range(60):
        write(tmp_path / "in" / f"{i}", "<|endoftext|>".join(stories[4 * i:4 * i + 4]))
    found = list(prepare.documents(*prepare.source(str(tmp_path / "in"))[1:], 0.1))
    splits = [split for split, _ in found]
    assert len(found) == 240 and {*splits} == {*prepare.SPLITS}
    assert all(len({*splits[i:i + 4]}) == 1 for i in range(0, 240, 4))


def test_files_larger_than_val_are_divided_among_many_small_ones(tmp_path, stories):
    """Whole, one would be all of val if val is furthest behind when it comes."""
    for i in range(6):
        write(tmp_path / "in" / f"large {i}", "<|endoftext|>".join(stories[60 + i::6]))
    for i in range(60):
        write(tmp_path / "in" / f"{i}", stories[i])
    found = list(prepare.documents(*prepare.source(str(tmp_path / "in"))[1:], 0.06))
    total = sum(len(text) for _, text in found)
    for split in "val", "test":
        size = sum(len(text) for which, text in found if which == split)
        assert abs(size - 0.06 * total) <= 1300


def test_each_size_of_vocabulary_has_its_own_last_folder(run, refused, stories, monkeypatch,
                                                         tmp_path):
    """As with a GPU and later without it: its tokens mean nothing to the other tokenizer."""
    run("--data", write(tmp_path / "text", "".join(stories)))
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 300)
    monkeypatch.setattr(prepare, "DEFAULT_DATA", "nonsense")
    assert "--data nonsense" in refused()


def test_a_program_or_a_folder_that_is_not_there_gets_one_line(refused, tmp_path):
    program = write(tmp_path / "train.py", "")
    assert "missing.py" in refused("--run", tmp_path / "missing.py", "--folder", tmp_path)
    assert "typo/meta.json" in refused("--run", program, "--folder", tmp_path / "typo")


@pytest.mark.parametrize("last, did", [
    (3, r"4 steps, [\d,]+ tokens/s"),
    (10 ** 9, r"\d+ steps, [\d,]+ tokens/s, this run saw the text \d+\.\d times")])
def test_a_report_says_in_words_what_the_run_did(tmp_path, stories, last, did):
    folder = prepare.prepare(str(write(tmp_path / "text", "".join(stories))))
    program = write(tmp_path / "train.py", f"""
import torch.nn as nn
import prepare

def train():
    for step, _ in enumerate(prepare.batches(64, 32)):
        if step == {last}:
            break
    return nn.Sequential(nn.Embedding(512, 8), nn.Linear(8, 512))
""")
    start(tmp_path / "log", "--run", program, "--folder", folder, "--budget", "0.3").join(60)
    log = (tmp_path / "log").read_text()
    assert re.search(rf"^did: +{did}$", log, re.M) and re.search(r"^val_bpb: +\d", log, re.M), log


def learned(*texts: str) -> prepare.Tokenizer:
    return prepare.Tokenizer(prepare.learn_merges(texts, 255))


def decode(tokenizer: prepare.Tokenizer, tokens: Iterable[int]) -> str:
    """Return the text of tokens: the merges say which bytes each stands for."""
    meaning = [bytes([i]) for i in range(256)]
    for left, right in tokenizer.rank:
        meaning.append(meaning[ord(left)] + meaning[ord(right)])
    return b"".join(meaning[token] for token in tokens).decode("utf-8", "replace")


def any_text(seed: int, size: int = 400) -> str:
    """Characters of all kinds, half of them hard ones: lone surrogates, joiners, line ends."""
    rng = random.Random(seed)
    few = " \t\r\n\0aé漢🙂\ud83d\u0301\u200d\xa0²٣_'."
    return "".join(rng.choice(few) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
                   for _ in range(size))


def test_tokens_stand_for_exactly_the_bytes_of_a_text_and_the_metric_counts_its_bytes(stories):
    tokenizer = learned(*stories[:60], *map(any_text, range(60)))
    for text in ("", "a", "\r\n\r\n", "\ufeff x", " " * 999, "x" * 999, "🙂" * 99, "a\u0301" * 99,
                 "a" + "\u0301" * 99, *map(any_text, range(100, 150))):
        tokens, exact = tokenizer.encode(text), text.encode("utf-8", "surrogatepass")
        assert decode(tokenizer, tokens) == exact.decode("utf-8", "replace")
        assert tokenizer.lengths[tokens].sum() == len(exact)


def test_bytes_are_exact_where_a_token_ends_inside_a_character():
    tokenizer = prepare.Tokenizer([(0x20, 0xC3), (0xF0, 0x9F), (256, 0xA9)])
    tokens = tokenizer.encode(" é è 🙂")
    assert tokens.tolist() == [258, 256, 0xA8, 0x20, 257, 0x99, 0x82]
    assert tokenizer.lengths[tokens].tolist() == [3, 2, 1, 1, 2, 1, 1]
    assert decode(tokenizer, tokens) == " é è 🙂"
    assert tokenizer.lengths.shape == (512,) and tokenizer.lengths[prepare.END] == 0


@pytest.mark.parametrize("text", [
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",                      # Hindi
    "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48 \u0e01\u0e33",                            # Thai
    "de\u0301veloppement a\u0300"], ids=["Hindi", "Thai", "French"])
def test_a_letter_and_its_combining_marks_stay_in_one_word(text):
    tokenizer = learned(text + "\n", text + "\n")       # enough merges for a token a word
    assert [decode(tokenizer, [token]).strip() for token in tokenizer.encode(text)] == text.split()


@pytest.mark.parametrize("unit", ["a", "a\u0301", "\u0301", "1", ".", " ", "\n"], ids=ascii)
def test_a_word_is_bounded_so_that_encoding_stays_linear(unit):
    assert learned(unit * 5000).lengths.max() <= 2 * (1 + 32 * 5)     # bytes of 1 + 32 letters


def test_merges_and_tokens_are_those_of_counting_and_joining_anew_each_time(stories):
    text = " ".join(re.findall("[a-z]{1,30}", stories[0] + stories[9])) + " aaaaaaa abababab" * 9
    words = [list(word.encode()) for word in re.findall(" ?[a-z]+", text)]
    expected = []
    for token in range(256, 456):
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        expected.append(best)
        for word in words:
            for i in range(len(word)):      # a word gets shorter, so that the last i find nothing
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = [token]
    merges = prepare.learn_merges([text], 200)
    assert merges == expected
    assert prepare.Tokenizer(merges).encode(text).tolist() == [*itertools.chain(*words)]


def test_files_of_tokens_hold_exactly_the_documents(c4, stories, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", c4.parent)
    files, reader = prepare.source("c4:4")[1:]
    share = prepare.HELD_OUT / (2.5 * sum(file.stat().st_size for file in files))
    kept = list(prepare.documents(files, reader, share))
    assert sorted(text for _, text in kept) == sorted(stories)
    tokenizer = prepare.Tokenizer(json.loads((c4 / "tokenizer.json").read_text()))
    for split in prepare.SPLITS:
        tokens = np.fromfile(c4 / f"{split}.bin", np.uint16)
        *parts, rest = np.split(tokens, np.flatnonzero(tokens == prepare.END) + 1)
        texts = [decode(tokenizer, part[:-1]) for part in parts]
        assert texts == [text for where, text in kept if where == split] and rest.size == 0
    meta, size = json.loads((c4 / "meta.json").read_text()), len("".join(stories).encode())
    count = sum(len(tokens) // 2 for tokens in bins(c4)) - len(kept)
    assert meta["documents"] == len(kept)
    assert meta["bytes_per_token"] == pytest.approx(size / count, abs=1e-4)
    assert meta["train_tokens"] == len(bins(c4)[0]) // 2


def test_a_preparation_that_was_killed_goes_on(hub, c4, cache, run, tmp_path):
    """kill -9 during a download, Ctrl-C and kill -9 while it encodes; then as if undisturbed."""
    encoding, log = tmp_path / "encoding", tmp_path / "log"
    part = cache / "downloads" / f"{Path(SHARD.format(1)).name}.part"

    def encode(self, text):
        encoding.write_text("it does")
        time.sleep(60)

    hub.faults[SHARD.format(1)] = ["stall"]
    for path, kill in (part, signal.SIGKILL), (encoding, signal.SIGINT), (encoding, signal.SIGKILL):
        process = start(log, "--data", "c4:4",
                        before=lambda: setattr(prepare.Tokenizer, "encode", encode))
        while process.is_alive() and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        os.killpg(process.pid, kill)        # as a terminal does, or the end of a container
        process.join(20)
        assert process.exitcode == -kill and "Traceback" not in log.read_text()
        assert not (cache / c4.name).exists()
        encoding.unlink(missing_ok=True)
    run("--data", "c4:4")
    assert bins(cache / c4.name) == bins(c4)
    assert [first > 0 for _, first in hub.asked] == [False, False, True, False, False]


def test_two_preparations_of_the_same_data_do_not_disturb_each_other(hub, c4, cache, tmp_path):
    logs = tmp_path / "one", tmp_path / "two"
    for process in [start(log, "--data", "c4:4") for log in logs]:
        process.join(60)
        assert process.exitcode == 0
    assert sum("training a tokenizer" in log.read_text() for log in logs) == 1
    assert all("or waiting for a process that does" in log.read_text() for log in logs)
    assert bins(cache / c4.name) == bins(c4) and len(hub.asked) == 4


def test_a_cache_that_may_only_be_read_serves_what_it_has(stories):
    with tempfile.TemporaryDirectory() as top:      # others may not look into tmp_path
        log, cache, text, other = (Path(top) / name for name in ("log", "cache", "text", "other"))

        def as_nobody():
            prepare.CACHE = cache
            if os.getuid() == 0:        # who may write anywhere
                os.setuid(65534)

        for folder, names in (cache, ["lock", "current-v512"]), (cache / "text-0", ["meta.json"]):
            for name in names:
                write(folder / name, "")
        (cache / "downloads").mkdir()
        write(text, "".join(stories))
        write(other, "text")
        (cache / "text-0").rename(cache / f"{prepare.source(str(text))[0]}-v512")
        for path in Path(top), cache:
            path.chmod(0o555)
        write(log, "").chmod(0o666)
        try:
            for data in text, other:
                start(log, "--data", data, before=as_nobody).join(30)
                last = log.read_text().splitlines()[-1]
                if data == text:
                    assert last.startswith(f"{cache}/text-") and "WARNING" not in log.read_text()
                else:       # names what it would have to write
                    assert f"Permission denied: '{cache}/other-" in last
                    assert "AUTORESEARCH_CACHE" in last
        finally:
            for path in Path(top), cache:
                path.chmod(0o755)


def test_a_user_without_a_home_has_a_cache():
    lines = """import pwd
from unittest.mock import Mock
pwd.getpwuid = Mock(side_effect=KeyError)
import prepare
print(prepare.CACHE)"""
    env = {name: os.environ[name] for name in os.environ.keys() - {"HOME", "AUTORESEARCH_CACHE"}}
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True,
                          env=env)
    assert done.stdout == "/tmp/.cache/autoresearch\n", done.stderr


def test_data_that_is_none_and_a_cache_that_cannot_be_written_get_one_line(refused, monkeypatch,
                                                                          tmp_path):
    for data in "nonsense", "c4:0", "c4:1025", "c4:x", "stdlib:2", "/no/where":
        line = refused("--data", data)
        assert f"--data {data}:" in line and "python, stdlib, tinystories, c4" in line
    (tmp_path / "empty").mkdir()
    assert "too little text in empty-" in refused("--data", tmp_path / "empty")
    monkeypatch.setattr(prepare, "CACHE", write(tmp_path / "file", "") / "cache")
    assert "AUTORESEARCH_CACHE" in refused("--data", "stdlib")


def test_too_little_text_says_how_much_is_enough(refused, run, tmp_path, stories):
    whole = "<|endoftext|>".join(stories)
    for text in whole[:30_000], "short", "\n" * 999, "a document that is long enough " * 9:
        line = refused("--data", write(tmp_path / "text", text))
        need = re.search(r"too little text in text-\w+: .* about ([\d.]+) MB", line)
        assert re.search(r"[01] files have \d\.\d\d MB in documents of 64 char", line)
        run("--data", write(tmp_path / "text", whole[:int(float(need[1]) * 1e6)]))


def test_a_disk_that_takes_no_more_gets_one_line(hub, cache, tmp_path):
    limit = resource.RLIMIT_FSIZE, (50_000, 50_000)
    process = start(tmp_path / "log", "--data", "c4:4", before=lambda: resource.setrlimit(*limit))
    process.join(60)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith("prepare.py: [Errno 27] File too large")
    assert not (cache / "current-v512").exists()


@pytest.mark.parametrize("visible, count, printed", [
    (None, 0, ""), (None, 2, "0,1"), ("", 0, ""), ("-1", 0, ""), ("GPU-ab,7", 2, "GPU-ab,7"),
    ("3,9,2", 1, "3"),       # CUDA ignores all names from the first unknown one on
    ("MIG-ab,MIG-cd", 1, "MIG-ab,MIG-cd")])      # a process sees one slice, however many are named
def test_devices_prints_the_names_of_what_torch_sees(run, monkeypatch, visible, count, printed):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(prepare.torch.cuda, "device_count", lambda: count)
    assert run("--devices") == printed + "\n"


def test_a_gpu_that_torch_cannot_use_gets_one_line(refused, monkeypatch):
    problem = RuntimeError("CUDA error: no kernel image is available\nmore")
    monkeypatch.setattr(prepare.torch, "ones", Mock(side_effect=problem))
    line = refused()
    assert "no kernel image" in line and "CUDA_VISIBLE_DEVICES=-1" in line and "more" not in line
