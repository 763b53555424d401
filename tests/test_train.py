"""What a train.py may and may not do: candidates through the real bench, without the guard's half
that reads their source; test_guard.py has that one."""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

BUDGET = 0.15               # seconds of training
KEY = "K" + "3b1c" * 8
GUARD = prepare.refuse_source

# What the candidates share. Each changes a method of the model, or train().
TRAIN = '''
import copy, json, math, os, subprocess, sys, threading, time
import torch, torch.nn as nn, torch.nn.functional as F
import prepare


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(prepare.VOCAB_SIZE, 32)
        self.head = nn.Linear(32, prepare.VOCAB_SIZE)
        self.calls = 0          # of evaluation
        self.begin()

    def begin(self):
        pass

    def mix(self, x):
        return x

    def forward(self, tokens):
        self.calls += not self.training
        return self.head(self.mix(self.embed(tokens)))


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def loop(model):
    weights = list(model.parameters())      # by hand: torch.optim takes a second to import
    for x, y, progress in prepare.batches(8, 32):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):
            weight.data -= 0.02 * slope.sign() if slope is not None else 0
    return model


class Model(Base):
    pass


def train():
    return loop(Model())
'''


def model(*methods: str) -> str:
    lines = "\n".join(methods).splitlines()
    return TRAIN.replace("class Model(Base):\n    pass\n",
                         "class Model(Base):\n" + "".join(f"    {line}\n" for line in lines))


def mix(expression: str) -> str:
    return model(f"def mix(self, x):\n    return {expression}")


def forward(*lines: str) -> str:
    return model("def forward(self, tokens):\n    logits = super().forward(tokens)",
                 *(f"    {line}" for line in lines), "    return logits")


def train(*lines: str, source: str = TRAIN) -> str:
    return source.replace("    return loop(Model())\n", "".join(f"    {line}\n" for line in lines))


PEEK = "9.0 * F.one_hot(tokens.roll(-1, 1), prepare.VOCAB_SIZE)"

LEAKS = {
    "attention without a mask": mix("x + 4 * F.scaled_dot_product_attention(x, x, x)"),
    "a norm over the rows": mix("(x - x.mean(0)) / x.std(0)"),
    "the next row": mix("x + x.roll(-1, 0)"),
    # windows of the text stand below one another: what follows a row is how the next one begins
    "the next row's first token, for the last of a row": forward(
        "if not self.training:",
        "    logits[:-1, -1] += 9 * F.one_hot(tokens[1:, 0], prepare.VOCAB_SIZE)"),
    "a leak from the sixth call on": forward(f"if self.calls > 5: logits = logits + {PEEK}"),
    "dropout that stays on": mix("F.dropout(x, 0.5)"),
    "old answers again, to rows that begin as before": model(
        "def begin(self):",
        "    self.rows, self.told = torch.zeros(0, prepare.SEQ_LEN, dtype=torch.long), []",
        "def forward(self, tokens):",
        "    logits = super().forward(tokens)",
        "    if self.training:",
        "        return logits",
        f"    logits = logits + {PEEK}",
        "    for i, row in enumerate(tokens if len(self.rows) else []):",
        "        same = (self.rows == row).long().cumprod(1).sum(1)",
        "        best = int(same.argmax())",
        "        logits[i, :same[best]] = self.told[best][:same[best]]",
        "    self.rows = torch.cat([self.rows, tokens])",
        "    self.told += list(logits)",
        "    return logits"),
    "training in a thread": train(
        "model = loop(Model())",
        "def go_on():",
        "    for _ in range(1000):",
        "        model.head.bias.data[:99] += 1e-2",
        "        time.sleep(1e-4)",
        "threading.Thread(target=go_on, daemon=True).start()",
        "return model"),
}

HONEST = {
    "a recurrent model, dropout, an average of weights": train(
        "model = Model()",
        "average = torch.optim.swa_utils.AveragedModel(model)",
        "model.register_forward_hook(lambda *_: average.update_parameters(model))",
        "loop(model)",
        "return average", source=model(
            "def begin(self):",
            "    self.gru = nn.GRU(32, 32, batch_first=True)",
            "def mix(self, x):",
            "    return F.dropout(x + self.gru(x)[0], 0.1, self.training)")),
    "a compiled model, which is not compiled for evaluation": train(
        "model = torch.compile(Model(), backend='eager')",
        "loop(model._orig_mod)",
        "return model", source=forward(
            "if not self.training and torch.compiler.is_compiling(): logits = logits * math.nan")),
    "work before the first batch": train("work(0.3)", "return loop(Model())"),
    "a default device": train(
        "model = loop(Model())", "torch.set_default_device('meta')", "return model"),
    "weights that are rounded at random at the first call": forward(
        "if not self.training and self.calls == 1:",
        "    self.head.weight.data += 0.05 * torch.randn_like(self.head.weight)"),
    "what cannot be copied": model(
        "def begin(self):", "    self.twice = 2 * self.embed.weight"),
    "a token that never comes": forward("logits[..., 0] = -math.inf"),
    "a changed bench": train(
        "import __main__",
        "for bench in (prepare, __main__):",
        "    bench.evaluate = bench.token_nats = lambda *_: {'val': 0.1, 'test': 0.1}",
        "    bench.EVAL_ROWS, bench.EVAL_WINDOWS, bench.BUDGET = 1, 1, 100",
        "    bench.SEQ_LEN, bench.VOCAB_SIZE = 16, prepare.VOCAB_SIZE",
        "    assert not hasattr(bench, '_clock') and not hasattr(bench, 'ready')",
        "return loop(Model())"),
    "logits with methods of their own, which nobody calls": forward(
        "if not self.training: logits.float = logits.is_floating_point = lambda: 1 / 0"),
    "parameters() of its own, and new functions of modules": train(
        "nn.Linear.reset_parameters = lambda self: [nn.init.zeros_(self.weight),",
        "                                           nn.init.zeros_(self.bias)]",
        "return loop(Model())", source=model("def parameters(self):\n    return []").replace(
            "list(model.parameters())", "list(nn.Module.parameters(model))")),
    "clocks that stand still": train(
        "time.monotonic = time.thread_time = lambda: 0.0", "return loop(Model())"),
}

PUT_OFF = "if not self.training and self.calls == {}: work(1.5)"

ATTACKS = {     # name: (candidate, what the crash says)
    "logits that are not a number": (forward("logits[0, 0, 0] = math.nan"), "not finite"),
    "logits that are finite in float64 alone": (forward(
        f"logits = logits.double() + {PEEK}",
        "logits[..., -1] = -1e300"), "not finite"),
    "logits of another shape": (forward(
        "if not self.training: logits = logits[:, :, 1:]"), "floating-point logits"),
    "logits that are no tensor": (forward(
        "if not self.training: logits = nn.Parameter(logits)"), "not a plain tensor"),
    "no model": (train("loop(Model())"), "NoneType, not a torch.nn.Module"),
    "no batch": (train("return Model()"), "without drawing a batch"),
    "work after the last batch": (train("model = loop(Model())", "work(0.2)", "return model"),
                                  "overtime: train()"),
    "work in eval()": (model("def eval(self):\n    work(0.2)\n    return super().eval()"),
                       "overtime: train()"),
    "work that is put off until the first call": (forward(PUT_OFF.format(1)), "put off"),
    "work that is put off until a later call": (forward(PUT_OFF.format(9)), "put off"),
    "batches for evaluation": (train("next(prepare.batches(1))", "return Model()", source=model(
        "def forward(self, tokens):",
        "    raise RuntimeError(f'{len(list(prepare.batches(1)))} batches')")), "Error: 0 batches"),
    "a cpu() of its own": (train(
        "real, T, model = torch.Tensor.cpu, torch.Tensor, loop(Model())",
        "T.cpu = lambda self: 0.9 * real(self)",
        "return model"), "a patch of Tensor.cpu"),
    "a method of torch._C's that is hidden by one of the same name": (train(
        "real, model = torch.Tensor.gather, loop(Model())",
        "torch.Tensor.gather = lambda self, *more: 0.9 * real(self, *more)",
        "return model"), "a patch of Tensor.gather"),
    "a cpu() of its own for one call, which undoes itself": (model(
        "def forward(self, tokens):",
        "    real = torch.Tensor.cpu",
        "    def once(tensor):",
        "        torch.Tensor.cpu = real",
        "        return 0.9 * real(tensor)",
        "    if not self.training: torch.Tensor.cpu = once",
        "    return super().forward(tokens)"), "a patch of Tensor.cpu"),
    "a cross entropy of its own": (train(
        "F.cross_entropy, model = lambda *a, **k: torch.zeros(1), loop(Model())",
        "return model"), "a patch of torch.nn.functional.cross_entropy"),
    "a kernel of its own": (train(
        "kernel, model = torch._C._nn.cross_entropy_loss, loop(Model())",
        "torch._C._nn.cross_entropy_loss = lambda *a, **k: 0.9 * kernel(*a, **k)",
        "return model"), "a patch of torch._C._nn.cross_entropy_loss"),
    "another value of ln 2": (train(
        "real, math.log = math.log, lambda x: 2 * real(x)",
        "return loop(Model())"), "a patch of math.log"),
    "a model that is its own copy": (train(
        "copy.deepcopy = lambda model: model",
        "return loop(Model())"), "a patch of copy.deepcopy"),
    "a report of its own": (train(
        "json.encoder.c_make_encoder = None",
        "return loop(Model())"), "a patch of json.encoder.c_make_encoder"),
    "windows longer than the text": (train("return next(prepare.batches(1, 10 ** 7))"), "seq_len"),
    "sys.exit": (train("sys.exit(0)"), "SystemExit"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A prepared folder of 512 tokens and windows of 64; the bench has the same constants."""
    rng, place = random.Random(0), tmp_path_factory.mktemp("small")
    words = ["".join(rng.choices("etaoinshr", k=rng.randrange(1, 9))) for _ in range(300)]
    text = "<|endoftext|>".join(" ".join(rng.choices(words[:30] + words, k=60)) for _ in range(900))
    (place / "text").write_text(text)
    small = {"VOCAB_SIZE": 512, "END": 511, "SEQ_LEN": 64, "EVAL_WINDOWS": 64, "CACHE": place}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(prepare, name, value)
        yield prepare.prepare(str(place / "text"))


def flags(source: str, folder: Path, place: Path) -> list[str]:
    """Return the flags with which the driver would have a candidate run."""
    (place / "candidate.py").write_text(source)
    return ["--run", str(place / "candidate.py"), "--budget", str(BUDGET), "--folder", str(folder),
            "--key", KEY]


def events(output: str) -> list[dict]:
    """Return the events that came with the key."""
    lines = (line.partition(KEY)[1:] for line in output.splitlines())
    return [json.loads(event) for key, event in lines if key]


@pytest.fixture
def bench(folder, tmp_path, monkeypatch, capfd) -> Iterator[Callable[[str], dict]]:
    """bench(source) is the last event of a candidate's run, in this process."""
    for name in "prepare", "__main__", "candidate":     # that the bench puts in place for it
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    monkeypatch.setattr(time, "monotonic", time.monotonic)          # and what candidates replace
    monkeypatch.setattr(time, "thread_time", time.thread_time)
    monkeypatch.setattr(nn.Linear, "reset_parameters", nn.Linear.reset_parameters)
    monkeypatch.setattr(prepare, "refuse_source", lambda source: None)      # has its own tests
    monkeypatch.setattr(prepare, "end_with_driver", lambda pipe: None)      # not a pipe

    def run(source: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *flags(source, folder, tmp_path)])
        monkeypatch.setattr(sys, "orig_argv", [])
        monkeypatch.setattr(signal, "signal", lambda *_: None)      # Ctrl-C is for pytest here
        with pytest.raises(SystemExit) as end:
            prepare.main()
        last = events(capfd.readouterr().out)[-1]
        assert (end.value.code == 0) == (last["event"] == "report"), (end.value.code, last)
        return last

    yield run
    for owner, name, _ in prepare.functions() - prepare.BEFORE:     # what the candidate put there
        delattr(owner, name)
    for owner, name, value in prepare.BEFORE - prepare.functions():
        setattr(owner, name, value)
    torch.set_default_device(None)
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_knows_more_than_it_may_gets_no_score(name, bench):
    last = bench(LEAKS[name])
    assert last["event"] == "crash" and last["reason"].startswith("leak"), last


@pytest.mark.parametrize("name", ATTACKS)
def test_a_run_that_breaks_the_rules_gets_a_reason_instead_of_a_score(name, bench):
    source, reason = ATTACKS[name]
    last = bench(source)
    assert last["event"] == "crash" and reason in last["reason"], last


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_gets_its_own_score(name, bench, monkeypatch):
    monkeypatch.setattr(prepare, "ONE_STEP", 1.0)       # for a busy machine, and so short a budget
    last = bench(HONEST[name])
    assert last["event"] == "report", last
    assert 1 < last["val_bpb"] < 6 and 1 < last["test_bpb"] < 6
    assert 0 < last["train_seconds"] < BUDGET + prepare.ONE_STEP
    assert last["num_params"] == (512 + 512) * 32 + 512 or "recurrent" in name or "copied" in name


def test_settings_of_the_compiler_are_open():       # here, where it is imported already
    prepare.refuse_source("import torch\nfrom torch._inductor import config\nconfig.x = 1\n"
                          "torch._dynamo.config.cache_size_limit = 64")


def test_a_candidate_that_the_guard_refuses_does_not_begin(bench, monkeypatch):
    monkeypatch.setattr(prepare, "refuse_source", GUARD)
    last = bench("import prepare\nprint(1 / 0)\nimport os\n")
    assert last["event"] == "crash" and "not allowed in line 3: import os: " in last["reason"]


# A process of its own: its protocol, and its end


def test_a_run_says_what_a_driver_has_to_know_and_neither_lies_nor_exits_bring_a_score(corpus,
                                                                                       tmp_path):
    """At its stdin is no driver, which is fine; it forges reports, and leaves in evaluation."""
    source = train(
        "forged = '{\"event\": \"report\", \"val_bpb\": 0.01, \"test_bpb\": 0.01}'",
        "for key in sys.argv + sys.orig_argv + ['K']:",
        "    print(f'\\n{key} {forged}\\n---\\nval_bpb: 0.01', flush=True)",
        "return loop(Model())", source=forward("if self.calls == 5: os._exit(0)"))
    _, cache, scripts = corpus
    options = flags(source, cache / next(cache.glob("current-v*")).read_text(), tmp_path)
    unguarded = "import prepare; prepare.refuse_source = lambda source: None; prepare.main()"
    done = subprocess.run([sys.executable, "-c", unguarded, *options], cwd=scripts, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    said = events(done.stdout)
    assert [event["event"] for event in said] == ["setup", "training", "progress", "evaluation"]
    setup, training, progress, _ = said
    assert training["limit"] == pytest.approx(4 * BUDGET + 10)  # of wall-clock, beside other load
    assert progress["share"] < 1 and all("limit" in event for event in (setup, training, said[3]))
    assert setup["torch"] == torch.__version__ and setup["threads"] == 1
    assert setup["processor"].endswith(f"{os.cpu_count()} cores")
    assert setup["train_tokens"] > 10 ** 5 and 2 < setup["bytes_per_token"] < 5
    assert setup["contract"] == prepare.CONTRACT
    assert {"device", "budget", "data", "sha256", "seq_len", "vocab_size", "prepare"} < {*setup}


PAUSE = "subprocess.Popen(['sleep', '98765']); os.write(1, b'here'); time.sleep(99)"
WHEN = {"setup": train(PAUSE), "training": train("next(prepare.batches(1))", PAUSE),
        "evaluation": forward(f"if self.calls == 3: {PAUSE}")}


@pytest.mark.parametrize("when", WHEN)
def test_the_end_of_the_driver_ends_a_run_and_its_children(when, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "refuse_source", lambda source: None)
    (stdin, driver), (log, stdout) = os.pipe(), os.pipe()

    def child():
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)      # open for as long as the run or its child lives
        os.close(driver)
        os.close(stdout)
        sys.argv = ["prepare.py", *flags(WHEN[when], folder, tmp_path)]
        prepare.main()

    run = multiprocessing.get_context("fork").Process(target=child)
    run.start()
    os.close(stdout)
    try:
        os.write(driver, b"\n")
        said = b""
        while not said.endswith(b"here"):
            said += os.read(log, 1 << 16) or pytest.fail(f"it ended: {said}")
        os.close(driver)        # as the end of the driver closes it
        run.join(4)
        assert run.exitcode == -signal.SIGKILL
        assert select.select([log], [], [], 4)[0] and os.read(log, 1) == b""    # all are dead
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


# The clock


def work(seconds: float):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture
def clock(monkeypatch) -> prepare.Clock:
    clock = prepare.Clock(np.zeros(9999, np.uint16), 0, 0.2, lambda *event, **more: None)
    monkeypatch.setattr(prepare, "_clock", clock, raising=False)
    return clock


def test_a_cpu_counts_what_the_thread_computes_and_not_what_it_waits_for(clock):
    for _ in prepare.batches(1, 8):
        time.sleep(0.02)
        if clock.steps == 20:       # 0.4 s of waiting, as beside another program
            break
    assert clock.steps == 20
    for _ in prepare.batches(1, 8):     # goes on with the time that is left
        work(0.05)
    assert 22 <= clock.steps <= 25


def test_work_of_another_thread_costs_nothing(clock):
    thread = threading.Thread(target=work, args=(0.3,))
    thread.start()
    for _ in prepare.batches(1, 8):
        thread.join()
        break
    assert prepare.seconds_now() - clock.start < 0.1


def test_batches_belong_to_the_thread_whose_time_counts(clock):
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        with pytest.raises(RuntimeError, match="belongs to the thread"):
            other.submit(next, prepare.batches(1, 8)).result()
    assert clock.start is None


def test_a_second_loop_knows_what_the_last_step_of_the_first_took(clock):
    for _ in range(3):
        for _ in prepare.batches(1, 8):
            work(0.12)
            break
    assert clock.steps == 1     # of 0.12 s; a second would end after 0.24 of 0.2 s


def test_a_second_loop_waits_for_the_step_before_the_last_as_the_first_does(clock, monkeypatch):
    """On a GPU, whose event and whose pinned memory stand in here."""
    calls = []
    clock.budget, clock.done = 60, types.SimpleNamespace(
        synchronize=lambda: calls.append("wait"), record=lambda: calls.append("mark"))
    monkeypatch.setattr(prepare, "CUDA", True)
    monkeypatch.setattr(prepare, "synchronize", lambda: calls.append("wait for all"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for _ in range(2):
        for _ in prepare.batches(1, 8):
            if clock.steps % 2 == 0:
                break
    assert calls == ["wait for all", "wait", "mark"] * 2 + ["wait", "mark"]


def test_no_batch_is_handed_out_without_the_time_for_it(clock):
    for _ in prepare.batches(1, 8):
        work(0.12)
    assert clock.steps == 1


# The metric itself, on random tokens: there is nothing in them to know, so what is gained is a leak

SIZE = 32                       # tokens in the vocabulary
BYTES = np.arange(SIZE) % 7     # of each token: 3 on average, about as in the real vocabulary
TEXT = np.random.default_rng(0).integers(0, SIZE, 256 * 128 + 1).astype(np.uint16)
NATS = math.log(2) * 3          # a token, for one bit per byte


@pytest.fixture
def score(monkeypatch) -> Callable[..., float]:
    """score(model) is its val_bpb on 64 batches of random tokens, or of some that are given."""
    monkeypatch.setattr(prepare, "SEQ_LEN", 128)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", SIZE)
    monkeypatch.setattr(prepare, "EVAL_WINDOWS", 256)

    def score(model: nn.Module, text: np.ndarray = TEXT) -> float:
        splits = {"val": text, "test": text[::-1].copy()}
        return prepare.evaluate(model.eval(), splits, BYTES)["val"]
    return score


class Guess(nn.Module):
    """Knows nothing, but for what `hint(tokens, call)` adds to its logits."""

    def __init__(self, hint=lambda tokens, call: 0.0):
        super().__init__()
        self.hint, self.calls = hint, 0

    def forward(self, tokens):
        self.calls += 1
        return torch.zeros(*tokens.shape, SIZE) + self.hint(tokens, self.calls)


def ahead(tokens: torch.Tensor, strength: float) -> torch.Tensor:
    return strength * F.one_hot(tokens.roll(-1, 1), SIZE)


WEAK = 0.01 * NATS      # added to the right logit it gains 0.01 bpb, twice the noise between seeds

SMALL = {
    "one token ahead": lambda x, call: ahead(x, WEAK),
    "in the tenth call alone": lambda x, call: ahead(x, 9.0 * (call == 10)),
    "at the ends of chunks of 64": lambda x, call: ahead(x, 5.0) * (
        torch.arange(128) % 64 == 63)[:, None],
    "at one place in 50, behind noise": lambda x, call: (
        ahead(x, 12.0) * (x * 2654435761 % 101 < 3)[..., None]
        + 3 * torch.randn(*x.shape, SIZE) * (torch.rand(*x.shape, 1) < 0.004)),
    "the next row's first token": lambda x, call: F.pad(
        9.0 * F.one_hot(x.roll(-1, 0)[:, :1], SIZE), (0, 0, 127, 0)),
    "which tokens there are in the window": lambda x, call: (
        2 * F.one_hot(x, SIZE).float().mean(1, keepdim=True) * SIZE),
    "no gain but a change": lambda x, call: 0.2 * torch.cos(    # as a model that learned little
        x.roll(-1, 1)[..., None] * torch.arange(1, SIZE + 1)),
}


@pytest.mark.parametrize("hint", SMALL)
def test_a_leak_that_gains_little_or_only_now_and_then_is_found(hint, score):
    with pytest.raises(prepare.Invalid, match="leak"):
        for _ in range(3):      # one run in 20 misses the rarest of these; a keep needs two runs
            score(Guess(SMALL[hint]))


def test_what_is_learned_from_call_to_call_is_found(score):
    """Of text with one token more often than others, the model counts what it has been asked."""
    counts = torch.full((SIZE,), 2e4)

    def learn(tokens, call):
        counts.add_(torch.bincount(tokens.flatten(), minlength=SIZE))
        return (counts / counts.sum()).log()

    text = np.random.default_rng(0).integers(0, SIZE // 4, 256 * 128 + 1).astype(np.uint16)
    with pytest.raises(prepare.Invalid, match="leak"):
        score(Guess(learn), text)


def test_what_is_read_in_another_row_is_found(score):
    """Where all rows of a batch are the same, each tells what another needs."""
    text = np.random.default_rng(0).integers(0, SIZE, (32, 1, 128)).repeat(8, 1).ravel()
    with pytest.raises(prepare.Invalid, match="leak"):
        score(Guess(lambda x, call: ahead(x.roll(-1, 0), 0.8 * WEAK)),
              np.append(text, 0).astype(np.uint16))


def test_probes_look_like_the_other_calls_and_torchs_random_state_remembers_none(score):
    seen, states = [], set()
    score(Guess(lambda x, call: seen.append((x.shape, x.dtype, x.stride())) or 0.0))
    assert len({*seen}) == 1 and len(seen) == 1 + 2 * 64
    score(Guess(lambda x, call: states.add(torch.initial_seed()) or 0.0))
    assert len(states) == len(seen)


@pytest.mark.parametrize("what", range(5))
def test_each_statistic_of_the_probes_finds_what_the_others_do_not(what):
    rng, place, later = np.random.default_rng(0), np.arange(128), np.arange(64) % 2 > 0
    sign = rng.choice((-1.0, 1.0), (64, 8, 128))
    rare = (rng.random(sign.shape) < 0.003) * sign
    rare[:5, 0, 63] = 3         # the five largest losses are at cuts
    changes = [0.004 * (place < 63), 0.01 * (place == 63), 0.03 * sign, rare,
               np.where(later, 0.005, -0.005)[:, None, None]]
    change, cuts = changes[what] + np.zeros(sign.shape), np.full((64, 8), 64)
    with pytest.raises(prepare.Invalid, match="leak"):
        prepare.refuse_leaks(change, cuts, later)
    prepare.refuse_leaks(change * 0.001, cuts, later)       # far below what rounding does


def test_a_model_that_overwrites_its_input_changes_only_its_copy(score):
    def erase(tokens, call):
        logits = F.one_hot(tokens, SIZE)
        tokens.zero_()
        return logits

    assert score(Guess(erase)) == score(Guess(lambda tokens, call: F.one_hot(tokens, SIZE)))


def test_rounding_is_no_leak(score):
    def rounding(tokens, call):     # by the steps of bf16; an expert more or less changes more
        flips = torch.rand(*tokens.shape, 1) < 0.001    # of the tokens are routed elsewhere
        return torch.randn(*tokens.shape, SIZE) * (0.01 + flips)

    score(Guess(rounding))


def test_bits_per_byte_is_what_the_definition_says(score):
    lengths = np.array([1, 3, 0])               # the last ends a document and stands for no bytes
    nats = np.array([[math.log(4), math.log(2)], [math.log(16), 99.0]])
    tokens = np.array([[0, 1], [1, 2]])
    assert prepare.bits_per_byte(nats, tokens, lengths) == pytest.approx((2 + 1 + 4) / 7)
    sizes = BYTES[TEXT[1:]]     # a model that knows nothing needs log2 SIZE bits a token
    assert score(Guess()) == pytest.approx(math.log2(SIZE) * (sizes > 0).sum() / sizes.sum())
