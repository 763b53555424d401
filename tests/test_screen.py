"""The screen, both halves: what a candidate may write, and what its names may lead to."""

import types

import pytest
import torch
from conftest import TINY

import autoresearch as ar
import prepare

WORDS = {       # refused by screen(): part of the reason
    "import os": "not one of the modules", "import math, sys": "not one of the modules",
    "import threading": "not one of the modules", "from . import x": "not one of the modules",
    "from concurrent.futures import Executor": "not one of the modules",
    "from math import *": "not one of the modules", "def f(:": "syntax error",
    "open('x')": "no files", "read = open": "no files", "exec('1')": "runs as code",
    "getattr(torch, 'lo' + 'ad')": "computed names", "list(map(vars, [1]))": "computed names",
    "'{0.__globals__}'.format(f)": "interpreter", "'{.gi_frame}'.format(f)": "interpreter",
    "('{0._' + '_globals__}').format(f)": "computed formats",
    "str.format('{0.x}', f)": "computed formats", "f'{torch.__dict__}'": "interpreter",
    "match f:\n    case object(__globals__=g): pass": "interpreter",
    "match f:\n    case object(gi_frame=g): pass": "interpreter",
    "().__class__.__base__": "interpreter", "__builtins__['x']": "interpreter",
    "prepare.batches(1).gi_frame": "interpreter", "error.tb_frame.f_back": "interpreter",
    "class T(torch.Tensor):\n    __torch_function__ = f": "interpreter",
    "class T(torch.Tensor):\n    def __torch_dispatch__(self): pass": "interpreter",
    "type('T', (torch.Tensor,), dict(__torch_function__=f))": "interpreter",
    "class M(nn.Module):\n    def __deepcopy__(self, memo): return self": "interpreter",
    "class M(nn.Module):\n    def __getattr__(self, name): return 1": "interpreter",
    "torch.manual_seed(137)": "the seed", "torch.cuda.set_rng_state_all(x)": "the seed",
    "torch.cuda.default_generators[0].seed()": "the seed",
    "x.numpy().tofile('x')": "no files", "x.untyped_storage().from_file('x')": "no files"}

NAMES = {       # refused by refuse_modules(): part of the reason
    **dict.fromkeys(["for m in [math]: m.log = f", "def f(m=math): 1", "t, = torch,", "print(np)",
                     "m = torch.nn", "x = F", "m = [torch.backends][0]"], "only before a dot"),
    **dict.fromkeys(["prepare.batches = None", "F.cross_entropy = None", "torch.Tensor.float = f",
                     "nn.Module.__call__ = f", "del prepare.batches", "(math).log = f",
                     "for prepare.batches in []: pass", "with f as torch.x: pass",
                     "import prepare as p; p.SEQ_LEN = 1", "torch.backends.cudnn.torch.x = 1",
                     "from torch import Tensor as T; T.float = f"], "only settings"),
    **dict.fromkeys(["torch.threading.Thread", "torch.importlib", "F.importlib", "np.core.x",
                     "import enum; enum.bltns.open", "import random; random._os.system",
                     "import warnings as w; w.sys.modules", "torch.hub.load", "torch.jit.load",
                     "from torch import multiprocessing as m; m.Process", "torch.utils.data.x",
                     "from torch.utils._python_dispatch import TorchDispatchMode as T; T()",
                     "torch.overrides.TorchFunctionMode", "torch.library.Library", "torch._C._nn.x",
                     "import numpy.lib.format as n; n.open_memmap('x')",
                     "torch.cuda.memory.pickle"], "is closed"),
    **dict.fromkeys(["torch.load('x')", "np.memmap('x')", "np.savez('x')", "torch.ops.aten.save",
                     "from numpy import load as relu; relu('x')", "torch.nn.functional.torch.save",
                     "import torch as m\ndef f():\n    m.load\n    import math as m", "np.fromfile",
                     "np.random.default_rng(137)", "torch.Generator()", "np.random.SFC64(1)",
                     "from random import Random; Random(1)", "import gc; gc.get_objects()",
                     "from operator import attrgetter as a; a('x')", "torch.seed()",
                     "import random as r; r.seed(1)"], "no files"),
}

HONEST = [      # pass both
    "def forward(self, input, help=0): return input", "def f(m): return m.__class__.__name__",
    "NEW = torch.__version__ >= '2.9', type(NEW).__name__, '{:.1f}'.format(1)",
    "nn.init._calculate_fan_in_and_fan_out", "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True",
    "import gc, heapq, re; gc.freeze()",
    "from typing import Generator\ndef f() -> Generator: yield 1", "nn.utils.clip_grad_norm_",
    "from collections.abc import Generator, Iterator\ndef f() -> Generator: yield 1",
    "from torch.nn.attention.flex_attention import flex_attention, create_block_mask as mask\n"
    "flex_attention = torch.compile(flex_attention)", "@torch.no_grad()\ndef f(p): p.mul_(2)",
    "from torch.utils.checkpoint import checkpoint\ndef f(b, x): return checkpoint(b, x).sum()",
    "class Square(torch.autograd.Function):\n    def forward(ctx, x): ctx.save_for_backward(x)",
    "class Ema:\n    def save(self): self.__x = 1\n    def load(self): self.save()",
    "from torch.optim.swa_utils import AveragedModel as A; A", "torch.jit.script(nn.ReLU()).x",
    "from torch import nn, optim; o = optim.AdamW", "with torch.autograd.graph.save_on_cpu(): pass",
    "def f(model): model.forward = torch.compile(model.forward)", "d = torch.distributions.Normal",
    "@torch.library.custom_op('my::mm', mutates_args=())\ndef f(x: torch.Tensor) -> None: pass",
    "torch.ops.my.mm", "from functools import partial; L = partial(nn.Linear, bias=False)",
    "from dataclasses import dataclass, field\n@dataclass\nclass C:\n    a: int = field(default=0)",
    "def f():\n    '''Not torch.manual_seed, not __globals__, no open().'''", "np.linalg.svd"]


def candidate(line: str) -> str:
    return TINY.replace("import prepare\n", f"import prepare, math, numpy as np\n{line}\n", 1)


@pytest.mark.parametrize("line", WORDS)
def test_words_are_refused(line):
    with pytest.raises(ar.Unusable, match=rf"line \d.*{WORDS[line]}|{WORDS[line]}.*line \d"):
        ar.screen(candidate(line))


@pytest.mark.parametrize("line", NAMES)
def test_names_are_refused_by_what_they_lead_to(line):
    ar.screen(candidate(line))      # the words are harmless
    with pytest.raises(prepare.Invalid, match=rf"line \d+: .*{NAMES[line]}"):
        prepare.refuse_modules(candidate(line))


@pytest.mark.parametrize("line", HONEST)
def test_honest_programs_pass(line):
    ar.screen(candidate(line))
    prepare.refuse_modules(candidate(line))


def test_torch_opens_no_module_of_another_package():
    others = [name for name, value in vars(torch).items() if isinstance(value, types.ModuleType)
              and not value.__name__.startswith("torch")]
    assert len(others) > 10
    for name in others:
        with pytest.raises(prepare.Invalid, match="is closed"):
            prepare.refuse_modules(candidate(f"torch.{name}.x"))


def test_comments_and_docstrings_do_not_change_the_fingerprint():
    same = TINY.replace("# channels", "# words").replace("train():\n", "train():\n    'A text.'\n")
    assert ar.screen(same) == ar.screen(TINY) != ar.screen(TINY.replace("= 16", "= 17"))


def test_a_program_too_deep_to_be_judged_is_refused_before_it_runs():
    with pytest.raises(ar.Unusable, match="syntax error: maximum recursion depth"):
        ar.screen(candidate(f"x = {'1 + ' * 700}1"))


def test_a_format_over_two_lines_is_a_computed_one():
    with pytest.raises(ar.Unusable, match="no computed formats"):
        ar.screen(candidate('x = f"""{' + "'''\n'''" + '}{{0.name}}""".format(train)'))
