"""The guard: what a candidate may write, and what its names may lead to."""

import sys
import types

import pytest
import torch
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

WORDS = {       # refused for a word: part of the reason
    "open('x')": "no files", "read = open": "no files", "exec('1')": "runs as code",
    "getattr(torch, 'lo' + 'ad')": "computed names", "list(map(vars, [1]))": "runs as code",
    "'{0.__globals__}'.format(f)": "no format", "'{.gi_frame}'.format(f)": "no format",
    "('{0._' + '_globals__}').format(f)": "no format", "'{:.1f}'.format(1)": "use f-strings",
    "str.format('{0.x}', f)": "no format", "f'{torch.__dict__}'": "interpreter",
    "getattr('{0.x' + '}', 'format')(f)": "no format", "get = getattr": "computed names",
    "getattr(f, '__globals__')": "interpreter", "getattr(f, 'gi_' + 'frame')": "computed names",
    "def hasattr(m, name): return m.load\nhasattr(torch, 'x')": "computed names",
    "f = lambda hasattr: hasattr(torch, 'x')": "computed names",
    "from math import log as getattr": "computed names", "hasattr(open('x'), 'y')": "no files",
    "match f:\n    case object(__globals__=g): pass": "interpreter",
    "match f:\n    case object(gi_frame=g): pass": "interpreter",
    "().__class__.__base__": "interpreter", "__builtins__['x']": "interpreter",
    "prepare.batches(1).gi_frame": "interpreter", "error.tb_frame.f_back": "interpreter",
    "class T(torch.Tensor):\n    __torch_function__ = f": "interpreter",
    "class T(torch.Tensor):\n    def __torch_dispatch__(self): pass": "interpreter",
    "type('T', (torch.Tensor,), dict(__torch_function__=f))": "interpreter",
    "class M(nn.Module):\n    def __deepcopy__(self, memo): return self": "interpreter",
    "class M(nn.Module):\n    def __getattr__(self, name): return 1": "interpreter",
    "torch.manual_seed(137)": "sets the seed.*leave it out",
    "torch.cuda.set_rng_state_all(x)": "the seed",
    "torch.cuda.default_generators[0].seed()": "the seed",
    "x.numpy().tofile('x')": "no files", "x.untyped_storage().from_file('x')": "no files"}

NAMES = {       # refused for what a name leads to: part of the reason
    **dict.fromkeys(["for m in [math]: m.log = f", "def f(m=math): 1", "t, = torch,", "print(np)",
                     "m = torch.nn", "x = F", "m = [torch.backends][0]", "getattr(torch, 'nn')",
                     "hasattr((torch, 1)[0], 'x')", "torch.importlib", "F.importlib",
                     "torch.cuda.memory.pickle"], "only before a dot"),
    "import os": "this is closed, as are files, processes and seeds: leave it out",
    **dict.fromkeys(["import math, sys", "import threading", "from . import x",
                     "from concurrent.futures import Executor", "from math import *",
                     "import torch.utils.data", "torch.threading.Thread", "np.core.x",
                     "from torch import os; os.system",
                     "import enum; enum.bltns.open", "import random; random._os.system",
                     "import warnings as w; w.sys.modules", "torch.hub.load", "torch.jit.load",
                     "from torch import multiprocessing as m; m.Process", "torch.utils.data.x",
                     "from torch.utils._python_dispatch import TorchDispatchMode as T; T()",
                     "torch.overrides.TorchFunctionMode", "torch.library.Library", "torch._C._nn.x",
                     "import numpy.lib.format as n; n.open_memmap('x')", "torch._C._nn.x = 1",
                     "torch.backends.cudnn.torch.utils.data = 1", "torch.load('x')",
                     "np.memmap('x')", "np.savez('x')", "torch.ops.aten.save",
                     "from numpy import load as relu; relu('x')", "torch.nn.functional.torch.save",
                     "import torch as m\ndef f():\n    m.load\n    import math as m", "np.fromfile",
                     "np.random.default_rng(137)", "torch.Generator()", "np.random.SFC64(1)",
                     "from random import Random; Random(1)", "import gc; gc.get_objects()",
                     "import gc; gc.callbacks.append(f)",
                     "from operator import attrgetter as a; a('x')", "torch.seed()",
                     "import random as r; r.seed(1)", "getattr(torch, 'load', None)",
                     "from torch.utils.checkpoint import TorchDispatchMode as T; T()"],
                    "is closed"),
}

HONEST = [
    "def forward(self, input, help=0): return input", "def f(m): return m.__class__.__name__",
    "NEW = torch.__version__ >= '2.9', type(NEW).__name__",
    "nn.init._calculate_fan_in_and_fan_out", "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True",
    "import gc, heapq, re; gc.freeze()",
    "from typing import Generator\ndef f() -> Generator: yield 1", "nn.utils.clip_grad_norm_",
    "nn.L1Loss()", "from torch.nn.utils import weight_norm as w; w",
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
    "hasattr(torch.backends, 'mps')", "hasattr(torch.cuda, name)", "import gc; hasattr(gc, 'x')",
    "class M(nn.Module):\n    def f(self): return getattr(self, 'x', 0), hasattr(self.f(), 'x')",
    "torch._dynamo.disable(train)", "@torch._dynamo.disable\ndef f(): pass",
    "torch.cuda.mem_get_info()[0]", "torch.nn.Linear.reset_parameters = lambda self: None",
    "try:\n    from torch.optim import None_Such as N\nexcept ImportError:\n    N = None",
    "def f():\n    '''Not torch.manual_seed, not __globals__, no open().'''", "np.linalg.svd"]


def candidate(line: str) -> str:
    return TINY.replace("import prepare\n", f"import prepare, math, numpy as np\n{line}\n", 1)


@pytest.mark.parametrize("line", WORDS | NAMES)
def test_what_is_closed_is_refused_by_its_words_or_by_what_its_names_lead_to(line):
    reason = (WORDS | NAMES)[line]
    with pytest.raises(prepare.Invalid, match=rf"not allowed in line \d+: .*{reason}"):
        prepare.refuse_source(candidate(line))


@pytest.mark.parametrize("line", HONEST)
def test_honest_programs_pass(line):
    prepare.refuse_source(candidate(line))


def test_torch_opens_no_module_of_another_package():
    others = [name for name, value in vars(torch).items() if isinstance(value, types.ModuleType)
              and value.__name__.partition(".")[0] not in prepare.MODULES]
    assert {"os", "sys", "importlib"} < {*others}
    for name in others:
        with pytest.raises(prepare.Invalid, match="is closed"):
            prepare.refuse_source(candidate(f"torch.{name}.x"))


def test_the_line_that_is_named_is_the_one_of_an_editor():
    with pytest.raises(prepare.Invalid, match="in line 3: import os: "):
        prepare.refuse_source("# a page\x0c and a line\u2028 end\nimport torch\nimport os\n")


def test_the_contract_names_every_module_on_offer_and_what_to_do_without_the_others():
    first = prepare.CONTRACT.split("\n- ")[1]
    assert all(name in first for name in (*prepare.MODULES, "import os", "torch.manual_seed"))
    prepare.refuse_source("".join(f"import {name}\n" for name in prepare.MODULES[1:]))
