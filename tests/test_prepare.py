"""What prepare.py promises of its data: documents, downloads, the tokenizer, tokens on disk.

Everything is small here: 150 kB of text, 512 tokens, windows of 32. What has to be a process of
its own is a fork of this one, since torch takes two seconds to import.
"""

import collections
import errno
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
import threading
import time
from collections.abc import Callable, Iterator
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
        patch.setattr(multiprocessing, "Pool", FORK.Pool)       # its workers are as small
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
        if data is None or fault.isdigit():
            return self.send_error(int(fault or 404))
        if first >= len(data) and first:
            return self.send_error(416)
        if fault == "no ranges":
            first = 0
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


@pytest.mark.parametrize("faults", [["503"], ["429"], ["empty"], ["drop", "no ranges"],
                                    ["drop", "503"] * 4], ids=" then ".join)
def test_a_download_outlives_what_a_network_does(hub, monkeypatch, faults):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    hub.faults[STORIES] = list(faults)
    assert prepare.source("tinystories")[1][0].read_bytes() == hub.files[STORIES]
    assert len(hub.asked) == 1 + sum(fault != "no ranges" for fault in faults)
    if "drop" in faults:        # goes on where it stopped, but for a last chunk
        half = len(hub.files[STORIES]) // 2
        assert half - (1 << 16) <= hub.asked[1][1] <= half


def test_a_download_that_brings_nothing_is_given_up_and_keeps_what_came(hub, cache, monkeypatch):
    pauses = []
    monkeypatch.setattr(prepare.time, "sleep", pauses.append)
    hub.faults[STORIES] = ["drop"] + ["503"] * 4
    with pytest.raises(requests.HTTPError):
        prepare.source("tinystories")
    assert len(hub.asked) == len(pauses) + 1 == 5 and pauses == sorted(pauses)
    [part] = (cache / "downloads").iterdir()
    assert part.suffix == ".part" and 0 < part.stat().st_size < len(hub.files[STORIES])
    part.write_bytes(hub.files[STORIES])        # as if it was stopped just before its end
    assert prepare.source("tinystories")[1][0].read_bytes() == hub.files[STORIES]


def test_default_data_alone_is_replaced_and_loudly_if_it_cannot_be_had(
        hub, run, refused, cache, stories, monkeypatch, tmp_path):
    write(tmp_path / "lib" / "main.py", "".join(stories))
    write(tmp_path / "lib" / "tests" / "other.py", "x = 1")     # not every Python comes with it
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(prepare, "DEFAULT_DATA", "c4")
    hub.files.clear()
    assert re.search("--data c4 cannot be downloaded .*--data stdlib", refused("--data", "c4"))
    assert not (cache / "current").exists() and len(hub.asked) == 1
    said = run()
    assert said.count("WARNING: c4 cannot be downloaded (404") == 1
    assert re.search(r"^stdlib-\w+: .* bytes per token$", said, re.M)
    folder = f"{cache / (cache / 'current').read_text()}\n"
    assert f"\n{folder}" in said and run() == folder, "the second time it is there"
    assert prepare.source("stdlib")[1] == [tmp_path / "lib" / "main.py"]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"<html>" + data,
                                    lambda data: gzip.compress(b"{}\n")],
                         ids=["cut", "no gzip", "no text"])
def test_a_corrupt_shard_is_named_and_fetched_again(hub, cache, run, refused, c4, damage):
    shard = cache / "downloads" / Path(SHARD.format(3)).name
    shard.write_bytes(damage(hub.files[SHARD.format(3)]))
    assert re.search(f"{shard.name} is corrupt .*delete it", refused("--data", "c4:4"))
    shard.unlink()
    assert not (cache / c4.name).exists()
    run("--data", "c4:4")
    assert bins(cache / c4.name) == bins(c4)


def test_a_folder_is_read_without_what_is_not_text_and_its_name_changes_with_its_content(
        tmp_path, capsys):
    def name(first: str, second: str) -> str:
        good = [write(tmp_path / "in" / "a", first), write(tmp_path / "in" / "sub" / "b", second)]
        name, files, _ = prepare.source(str(tmp_path / "in"))
        assert files == good
        assert "skipped 2 of 4 files" in capsys.readouterr().out    # a pipe or a link is no file
        return name

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


def learned(*texts: str) -> prepare.Tokenizer:
    return prepare.Tokenizer(prepare.learn_merges(texts, 255))


def any_text(seed: int, size: int = 400) -> str:
    """Characters of all kinds, half of them hard ones: lone surrogates, joiners, line ends."""
    rng = random.Random(seed)
    few = " \t\r\n\0aé漢🙂\ud83d\u0301\u200d\xa0²٣_'."
    return "".join(rng.choice(few) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
                   for _ in range(size))


def test_decode_is_the_inverse_of_encode_and_the_metric_counts_its_bytes(stories):
    tokenizer = learned(*stories[:60], *map(any_text, range(60)))
    for text in ("", "a", "\r\n\r\n", "\ufeff x", " " * 999, "x" * 999, "🙂" * 99, "a\u0301" * 99,
                 "a" + "\u0301" * 99, *map(any_text, range(100, 150))):
        tokens, exact = tokenizer.encode(text), text.encode("utf-8", "surrogatepass")
        assert tokenizer.decode(tokens) == exact.decode("utf-8", "replace")
        assert tokenizer.lengths[tokens].sum() == len(exact)


def test_bytes_are_exact_where_a_token_ends_inside_a_character():
    tokenizer = prepare.Tokenizer([(0x20, 0xC3), (0xF0, 0x9F), (256, 0xA9)])
    tokens = tokenizer.encode(" é è 🙂")
    assert tokens == [258, 256, 0xA8, 0x20, 257, 0x99, 0x82]
    assert tokenizer.lengths[tokens].tolist() == [3, 2, 1, 1, 2, 1, 1]
    assert tokenizer.decode([*tokens, prepare.END]) == " é è 🙂"
    assert tokenizer.lengths.shape == (512,) and tokenizer.lengths[prepare.END] == 0


@pytest.mark.parametrize("text", [
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",                      # Hindi
    "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48 \u0e01\u0e33",                            # Thai
    "de\u0301veloppement a\u0300"], ids=["Hindi", "Thai", "French"])
def test_a_letter_and_its_combining_marks_stay_in_one_word(text):
    tokenizer = learned(text + "\n", text + "\n")       # enough merges for a token a word
    assert [tokenizer.decode([token]).strip() for token in tokenizer.encode(text)] == text.split()


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
    assert prepare.Tokenizer(merges).encode(text) == [*itertools.chain(*words)]


def test_files_of_tokens_hold_exactly_the_documents(c4, stories, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", c4.parent)
    kept = list(prepare.documents(*prepare.source("c4:4")[1:], 0.06))
    assert sorted(text for _, text in kept) == sorted(stories)
    decode = prepare.Tokenizer(json.loads((c4 / "tokenizer.json").read_text())).decode
    for split in prepare.SPLITS:
        tokens = np.fromfile(c4 / f"{split}.bin", np.uint16)
        *parts, rest = np.split(tokens, np.flatnonzero(tokens == prepare.END) + 1)
        assert [decode(part) for part in parts] == [text for where, text in kept if where == split]
        assert rest.size == 0
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
        assert process.exitcode == (1 if kill == signal.SIGINT else -kill), log.read_text()
        assert ("prepare.py: stopped" in log.read_text()) == (kill == signal.SIGINT)
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
    assert bins(cache / c4.name) == bins(c4) and len(hub.asked) == 4


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_what_is_prepared_is_not_made_again_even_where_nothing_can_be_locked(
        c4, hub, run, monkeypatch, code):
    monkeypatch.setattr(prepare, "CACHE", c4.parent)
    monkeypatch.setattr(prepare.fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
    times = [path.stat().st_mtime_ns for path in c4.iterdir()]
    assert re.search(f"WARNING: .*{os.strerror(code)}", run("--data", "c4:4"))
    assert times == [path.stat().st_mtime_ns for path in c4.iterdir()] and not hub.asked


def test_without_fcntl_one_line_names_wsl2():
    lines = "import sys; sys.modules['fcntl'] = None; import prepare"
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "WSL2" in done.stderr


def test_data_that_is_none_and_a_cache_that_cannot_be_written_get_one_line(refused, monkeypatch,
                                                                          tmp_path):
    for data in "nonsense", "c4:0", "c4:1025", "c4:x", "stdlib:2", "/no/where":
        line = refused("--data", data)
        assert f"--data {data}:" in line and "stdlib, tinystories, c4" in line
    (tmp_path / "empty").mkdir()
    assert "too little text in empty-" in refused("--data", tmp_path / "empty")
    monkeypatch.setattr(prepare, "CACHE", write(tmp_path / "file", "") / "cache")
    assert "AUTORESEARCH_CACHE" in refused("--data", "stdlib")


def test_too_little_text_says_how_much_is_enough(refused, run, tmp_path, stories):
    whole = "<|endoftext|>".join(stories)
    for text in whole[:50_000], "short", "\n" * 999, "a document that is long enough " * 9:
        line = refused("--data", write(tmp_path / "text", text))
        need = re.search(r"too little text in text-\w+: .* about ([\d.]+) MB", line)
        run("--data", write(tmp_path / "text", whole[:int(float(need[1]) * 1e6)]))


def test_a_disk_that_takes_no_more_gets_one_line(hub, cache, tmp_path):
    limit = resource.RLIMIT_FSIZE, (50_000, 50_000)
    process = start(tmp_path / "log", "--data", "c4:4", before=lambda: resource.setrlimit(*limit))
    process.join(60)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith("prepare.py: File too large")
    assert not (cache / "current").exists()


@pytest.mark.parametrize("visible, count, printed", [
    (None, 0, ""), (None, 2, "0,1"), ("", 0, ""), ("-1", 0, ""),
    ("GPU-ab,MIG-cd", 2, "GPU-ab,MIG-cd"), ("3,9,2", 1, "3")])
def test_devices_prints_the_names_of_what_torch_sees(run, monkeypatch, visible, count, printed):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(prepare.torch.cuda, "device_count", lambda: count)
    assert run("--devices") == printed + "\n"


def test_a_gpu_that_torch_cannot_use_is_named(run, refused, monkeypatch, c4):
    monkeypatch.setattr(prepare, "CACHE", c4.parent)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "WARNING" not in run("--data", "c4:4")       # CUDA_VISIBLE_DEVICES is -1, on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "cannot use the NVIDIA GPU" in run("--data", "c4:4")
    monkeypatch.setattr(prepare, "CUDA", True)
    monkeypatch.setattr(prepare.torch, "ones", Mock(side_effect=RuntimeError("no kernel\nmore")))
    monkeypatch.setattr(prepare.torch.cuda, "get_device_capability", lambda: (6, 1))
    assert re.search(r"no kernel.*\(6, 1\).*CUDA_VISIBLE_DEVICES=-1", refused())
