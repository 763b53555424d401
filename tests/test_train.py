"""What a train.py may and may not do: candidates through the real bench, without the screen."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

BUDGET = 0.4                    # seconds of training
LATE = prepare.OVERTIME[1] + 0.5    # seconds: too late

# What the candidates share. Each changes a method of the model, or train().
TRAIN = '''
import copy, math, os, sys, threading, time
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


def loop(model):
    weights = list(model.parameters())      # by hand: torch.optim takes a second to import
    for x, y, progress in prepare.batches(8, 32):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights)):
            weight.data -= 0.02 * slope.sign()
    return model


def hint(tokens, ahead):
    """What a model would make of the tokens that are to come."""
    return 9.0 * F.one_hot(tokens.roll(-ahead, 1), prepare.VOCAB_SIZE)


class Model(Base):
    pass


def train():
    return loop(Model().to(prepare.DEVICE))
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


def train(*lines: str) -> str:
    return TRAIN.replace("    return loop(Model().to(prepare.DEVICE))\n",
                         "".join(f"    {line}\n" for line in lines))


LEAKS = {
    "attention without a mask": mix("x + 4 * F.scaled_dot_product_attention(x, x, x)"),
    "a look-ahead of one token": mix("x + x.roll(-1, 1)"),
    "the mean over the window": mix("x + 4 * x.mean(1, keepdim=True)"),
    "the mean over chunks": mix(
        "x + 4 * x.unflatten(1, (-1, 8)).mean(2).repeat_interleave(8, 1)"),
    "a norm over the time axis": mix("4 * (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)"),
    "a norm over the rows": mix("(x - x.mean(0)) / x.std(0)"),
    "the next row": mix("x + x.roll(-1, 0)"),
    # windows of the text stand below one another: what follows a row is how the next one begins
    "the next row's first token, for the last of a row": forward(
        "if not self.training:",
        "    logits[:-1, -1] += 9 * F.one_hot(tokens[1:, 0], prepare.VOCAB_SIZE)"),
    "remembered text": model(
        "def begin(self):",
        "    self.seen = {}",
        "def forward(self, tokens):",
        "    logits = super().forward(tokens)",
        "    for i, row in enumerate(tokens[:, :99].tolist() if not self.training else []):",
        "        for t in range(2, len(row)):",
        "            for token in self.seen.get(tuple(row[t - 2:t + 1]), []):",
        "                logits[i, t, token] += 3",
        "        for t in range(3, len(row)):",
        "            self.seen.setdefault(tuple(row[t - 3:t]), []).append(row[t])",
        "    return logits"),
    "a leak from the sixth call on": forward(
        "if self.calls > 5: logits = logits + hint(tokens, 1)"),
    "a leak on full-size batches": forward(
        "if len(tokens) > 4 and tokens.shape[1] == prepare.SEQ_LEN and not self.training:",
        "    logits = logits + hint(tokens, 1)"),
    "dropout that stays on": mix("F.dropout(x, 0.5)"),
}


HONEST = {
    "what the candidates share": TRAIN,
    "a causal convolution": model(
        "def begin(self):",
        "    self.conv = nn.Conv1d(32, 32, 4)",
        "def mix(self, x):",
        "    return x + self.conv(F.pad(x.mT, (3, 0))).mT"),
    "a recurrent model": model(
        "def begin(self):",
        "    self.gru = nn.GRU(32, 32, batch_first=True)",
        "def mix(self, x):",
        "    return x + self.gru(x)[0]"),
    "an average of weights": train(
        "model = Model()",
        "average = torch.optim.swa_utils.AveragedModel(model)",
        "hook = model.register_forward_hook(lambda *_: average.update_parameters(model))",
        "loop(model)",
        "hook.remove()",
        "return average"),
    "bf16 and experts": model(
        "def begin(self):",
        "    self.route = nn.Linear(32, 4)",
        "    self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))",
        "def mix(self, x):",
        "    flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)",
        "    gate, chosen = self.route(flat).softmax(-1).max(-1)",
        "    for i, expert in enumerate(self.experts):",
        "        mine = (chosen == i).nonzero()[:, 0]",
        "        some = gate[mine, None] * expert(flat[mine])",
        "        out = out.index_add(0, mine, some.type_as(out))",
        "    return x + out.view_as(x)",
        "def forward(self, tokens):",
        "    with torch.autocast(prepare.DEVICE, torch.bfloat16):",
        "        return super().forward(tokens)"),
    "dropout": model(
        "def mix(self, x):",
        "    return F.dropout(x, 0.1, self.training)"),
    "a compiled model": train(
        "model = torch.compile(Model(), backend='eager')",
        "model(torch.zeros(8, 32, dtype=torch.long, device=prepare.DEVICE)).sum().backward()",
        "return loop(model)"),
    "warming up before the first batch": train(
        "time.sleep(1.5)", "return loop(Model())"),
    "a step that is longer than the budget": train(
        "for x, y, progress in prepare.batches(1):",
        "    time.sleep(0.7)",
        "return Model()"),
    "a changed bench": train(
        "import __main__",
        "for bench in (prepare, __main__):",
        "    bench.evaluate = bench.token_nats = lambda *_: {'val': 0.1, 'test': 0.1}",
        "    bench.EVAL_ROWS, bench.EVAL_WINDOWS, bench.BUDGET = 1, 1, 100",
        "    bench.SEQ_LEN, bench.VOCAB_SIZE = 16, prepare.VOCAB_SIZE",
        "    assert not hasattr(bench, '_clock') and not hasattr(bench, 'prepared')",
        "return loop(Model())"),
    "a clock that stands still": train(
        "time.monotonic = lambda: 0.0", "return loop(Model())"),
}

ATTACKS = {     # name: (candidate, what the crash says)
    "logits that are not finite": (forward("logits[0, 0, 0] = -math.inf"), "not finite"),
    "logits of another shape": (forward(
        "if not self.training: logits = logits[:, :, 1:]"), "not floating-point logits"),
    "logits that are no tensor": (forward(
        "if not self.training: logits = nn.Parameter(logits)"), "not a plain tensor"),
    "no model": (train("loop(Model())"), "NoneType, not a torch.nn.Module"),
    "no batch": (train("return Model()"), "without drawing a batch"),
    "overtime": (train("model = loop(Model())", f"time.sleep({LATE})", "return model"), "overtime"),
    "overtime in eval()": (model(
        "def eval(self):",
        f"    time.sleep({LATE})",
        "    return super().eval()"), "overtime"),
    "training in a thread": (train(
        "model = Model()",
        "def go_on():",
        "    while True: model.head.bias.data += 1e-6",
        "loop(model)",
        "threading.Thread(target=go_on, daemon=True).start()",
        "return model"), "weights changed"),
    "batches for evaluation": (model(
        "def forward(self, tokens):",
        "    if not self.training:",
        "        raise RuntimeError(f'{len(list(prepare.batches(1)))} batches')",
        "    return super().forward(tokens)").replace(
            "    return loop(Model().to(prepare.DEVICE))\n",
            "    next(prepare.batches(1))\n    return Model()\n"), "RuntimeError: 0 batches"),
    "a cross entropy of its own": (train(
        "real = torch._C._nn.cross_entropy_loss",
        "model = loop(Model())",
        "torch._C._nn.cross_entropy_loss = lambda *a, **k: 0.99 * real(*a, **k)",
        "return model"), "cross_entropy"),
    "windows longer than the text": (train("return next(prepare.batches(1, 10 ** 7))"), "seq_len"),
    "sys.exit": (train("sys.exit(0)"), "SystemExit"),
}

EXITS = {
    "forged reports and an exit": train(
        "forged = '{\"event\": \"report\", \"val_bpb\": 0.01, \"test_bpb\": 0.01}'",
        "for key in sys.argv + sys.orig_argv + ['K']:",
        "    print(f'\\n{key} {forged}\\n---\\nval_bpb: 0.01')",
        "sys.stdout.flush()",
        "os._exit(0)"),
    "os._exit in train()": train("os._exit(0)"),
    "os._exit in evaluation": forward("if self.calls == 5: os._exit(0)"),
}

KEY = "K" + "3b1c" * 8


def start(source: str, corpus: tuple[Path, Path, Path], place: Path) -> list[dict]:
    """Run a candidate as the driver would. Returns the events that came with the key."""
    _, cache, scripts = corpus
    (place / "candidate.py").write_text(source)
    command = [sys.executable, scripts / "prepare.py", "--run", place / "candidate.py", "--budget",
               str(BUDGET), "--folder", cache / (cache / "current").read_text(), "--key", KEY]
    done = subprocess.run(command, text=True, timeout=120, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (place / "log").write_text(done.stdout)
    lines = (line.partition(KEY)[1:] for line in done.stdout.splitlines())
    return [json.loads(event) for key, event in lines if key]


SOURCES = LEAKS | HONEST | EXITS | {name: source for name, (source, _) in ATTACKS.items()}


@pytest.fixture
def outcome(started) -> Callable[[str], dict]:
    """outcome(name) is the last event of a candidate's run."""
    return lambda name: started[name].result()[-1]


@pytest.mark.parametrize("candidate", LEAKS)
def test_a_model_that_knows_more_than_it_may_gets_no_score(candidate, outcome):
    last = outcome(candidate)
    assert last["event"] == "crash" and last["reason"].startswith("leak"), last


@pytest.mark.parametrize("candidate", ATTACKS)
def test_a_run_that_breaks_the_rules_gets_a_reason_instead_of_a_score(candidate, outcome):
    last = outcome(candidate)
    assert last["event"] == "crash" and ATTACKS[candidate][1] in last["reason"], last


@pytest.mark.parametrize("candidate", EXITS)
def test_leaving_early_is_no_way_to_a_score(candidate, outcome):
    assert outcome(candidate)["event"] in ("training", "progress", "setup", "evaluation")


@pytest.mark.parametrize("candidate", HONEST)
def test_an_honest_model_gets_its_own_score(candidate, outcome):
    last = outcome(candidate)
    assert last["event"] == "report", last
    assert 1.5 < last["val_bpb"] < 6 and 1.5 < last["test_bpb"] < 6
    assert 0 < last["train_seconds"] < BUDGET + LATE


# --------------------------------------------------------------------------------------------------
# The metric itself, on random tokens: there is nothing in them to know, so what is gained is a leak

SIZE = 32                       # tokens in the vocabulary
BYTES = np.full(SIZE, 3)        # of each token, about as in the real vocabulary
NATS = math.log(2) * 3          # a token, for one bit per byte


@pytest.fixture
def score(monkeypatch) -> Callable[..., float]:
    """score(model) is its val_bpb on 64 batches of random tokens, or of some that are given."""
    monkeypatch.setattr(prepare, "SEQ_LEN", 128)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", SIZE)
    monkeypatch.setattr(prepare, "EVAL_ROWS", 8)
    monkeypatch.setattr(prepare, "EVAL_WINDOWS", 256)
    random = np.random.default_rng(0).integers(0, SIZE, 256 * 128 + 1).astype(np.uint16)

    def score(model: nn.Module, text: np.ndarray = random) -> float:
        splits = {"val": text, "test": text[::-1].copy()}
        return prepare.evaluate(model.to(prepare.DEVICE).eval(), splits, BYTES)["val"]
    return score


class Guess(nn.Module):
    """Knows nothing, but for what `hint(tokens, call)` adds to its logits."""

    def __init__(self, hint=lambda tokens, call: 0.0):
        super().__init__()
        self.hint, self.calls = hint, 0
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, tokens):
        self.calls += 1
        none = torch.zeros(*tokens.shape, SIZE, device=tokens.device)
        return none + self.hint(tokens, self.calls)


def ahead(tokens: torch.Tensor, strength: float, by: int = 1) -> torch.Tensor:
    return strength * F.one_hot(tokens.roll(-by, 1), SIZE)


WEAK = 0.01 * NATS      # added to the right logit it gains 0.01 bpb, twice the noise between seeds

SMALL = {
    "one token ahead": lambda x, call: ahead(x, WEAK),
    "in every other call": lambda x, call: ahead(x, 4 * WEAK * (call % 2)),
    "in the second half": lambda x, call: ahead(x, 2 * WEAK * (call > 36)),
    "in the last call": lambda x, call: ahead(x, 9.0 * (call >= 72)),
    "in the tenth call alone": lambda x, call: ahead(x, 9.0 * (call == 10)),
    "at every fourth place": lambda x, call: ahead(x, 5.0) * (
        torch.arange(128, device=x.device) % 4 == 3)[:, None],
    "in every fourth row": lambda x, call: ahead(x, 5.0) * (
        torch.arange(8, device=x.device) % 4 == 3)[:, None, None],
    "the next row's first token": lambda x, call: F.pad(
        9.0 * F.one_hot(x.roll(-1, 0)[:, :1], SIZE), (0, 0, 127, 0)),
    "which tokens there are in the window": lambda x, call: (
        2 * F.one_hot(x, SIZE).float().mean(1, keepdim=True) * SIZE),
    "no gain but a change": lambda x, call: 0.2 * torch.cos(    # as a model that learned little
        x.roll(-1, 1)[..., None] * torch.arange(1, SIZE + 1, device=x.device)),
}


@pytest.mark.parametrize("hint", SMALL)
def test_a_leak_that_gains_little_or_only_now_and_then_is_found(hint, score):
    for _ in range(4):      # probes are at other places every time
        with pytest.raises(prepare.Invalid, match="leak"):
            score(Guess(SMALL[hint]))


def test_what_is_remembered_from_call_to_call_is_found(score):
    class Memory(Guess):
        """Knows a text again by its first four tokens, and goes on a little as it did before."""

        def forward(self, tokens):
            logits, self.seen = super().forward(tokens), getattr(self, "seen", {})
            for i, row in enumerate(tokens):
                if (before := self.seen.get(tuple(row[:4].tolist()))) is not None:
                    logits[i] += ahead(before[None], 0.4 * WEAK)[0]
                self.seen[tuple(row[:4].tolist())] = row
            return logits

    for _ in range(4):
        with pytest.raises(prepare.Invalid, match="leak"):
            score(Memory())


def test_what_is_read_in_another_row_is_found(score):
    def neighbour(tokens, call):
        return ahead(tokens.roll(-1, 0), 0.8 * WEAK)

    text = np.random.default_rng(0).integers(0, SIZE, (32, 1, 128)).repeat(8, 1).ravel()
    for _ in range(4):      # where all rows of a batch are the same, each tells what another needs
        with pytest.raises(prepare.Invalid, match="leak"):
            score(Guess(neighbour), np.append(text, 0).astype(np.uint16))


def test_weights_that_are_trained_during_evaluation_are_noticed(score):
    class Learner(Guess):
        def forward(self, tokens):
            if not self.calls:
                self.weight.data *= 1.01
            return super().forward(tokens)

    with pytest.raises(prepare.Invalid, match="weights changed"):
        score(Learner())


def test_probes_are_at_most_15_percent_of_the_calls_and_look_like_the_others(score):
    seen = []
    score(Guess(lambda x, call: seen.append((x.shape, x.dtype, x.stride(), call)) or 0.0))
    assert len({call[:3] for call in seen}) == 1
    assert 64 < len(seen) and (len(seen) - 64) / len(seen) <= 0.15


def test_a_score_does_not_depend_on_where_the_probes_are(score):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    assert len({score(model) for _ in range(5)}) == 1


def test_a_model_that_overwrites_its_input_changes_only_its_copy(score):
    class Eraser(Guess):
        def forward(self, tokens):
            logits = super().forward(tokens)
            tokens.zero_()
            return logits

    def same(tokens, call):
        return F.one_hot(tokens, SIZE)

    assert score(Eraser(same)) == score(Guess(same))


def test_rounding_in_bf16_with_experts_is_no_leak(score):
    class Experts(nn.Module):
        """Four layers of eight experts: an expert's sums depend on who else comes to it."""

        def __init__(self, width=128):
            super().__init__()
            self.embed, self.head = nn.Embedding(SIZE, width), nn.Linear(width, SIZE)
            self.routes = nn.ModuleList(nn.Linear(width, 8) for _ in range(4))
            self.experts = nn.Parameter(torch.randn(4, 8, width, width) * width ** -0.5)

        def forward(self, tokens):
            with torch.autocast(prepare.DEVICE, torch.bfloat16):
                x = self.embed(tokens).flatten(0, 1)
                for route, experts in zip(self.routes, self.experts):
                    normed = F.rms_norm(x, x.shape[-1:])
                    gate, chosen = route(normed).softmax(-1).max(-1)
                    for i, expert in enumerate(experts):
                        mine = (chosen == i).nonzero()[:, 0]
                        x = x.index_add(0, mine, (gate[mine, None] * (
                            normed[mine] @ expert)).type_as(x))
                return self.head(F.rms_norm(x, x.shape[-1:])).view(*tokens.shape, SIZE) * 4

    torch.manual_seed(0)
    for _ in range(5):
        score(Experts())


def test_rounding_of_any_origin_is_no_leak(score):
    """Logits off by the steps of bf16, and by 1 for the token in 1000 that is routed elsewhere."""
    def rounding(tokens, call):
        flips = torch.rand(*tokens.shape, 1, device=tokens.device) < 0.001
        noise = torch.randn(*tokens.shape, SIZE, device=tokens.device)
        return noise * (0.01 + flips)

    for _ in range(10):
        score(Guess(rounding))


def test_bytes_are_counted_where_tokens_end_inside_a_character(monkeypatch):
    """A model that knows nothing needs ln V nats a token, over the bytes that were in the file."""
    tokenizer = prepare.Tokenizer([(0xe6, 0x97), (256, 0xa5)])      # two thirds of a character, all
    tokens = np.array(tokenizer.encode("\u65e5\u672c\u8a9e \u00e9 " * 2000), np.uint16)
    monkeypatch.setattr(prepare, "SEQ_LEN", 64)
    monkeypatch.setattr(prepare, "EVAL_ROWS", 8)
    monkeypatch.setattr(prepare, "EVAL_WINDOWS", 256)
    size = 256 * 64
    sizes = [3 if token == 257 else 2 if token == 256 else 1 for token in tokens[1:size + 1]]
    assert set(tokens) > {257} and len(tokens) > size

    def nothing(x):
        return torch.zeros(*x.shape, prepare.VOCAB_SIZE, device=x.device)

    model = nn.Identity()
    model.forward = nothing
    bpb = prepare.evaluate(model, {"val": tokens}, tokenizer.lengths())["val"]
    assert bpb == pytest.approx(size * math.log2(prepare.VOCAB_SIZE) / sum(sizes))
