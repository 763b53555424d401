"""A short, strong GPT: the file under research.

    python train.py         # train it once and print the score

The contract: train() returns a model with model(tokens) -> logits, (B, T) int64 -> float (B, T,
VOCAB_SIZE). Batches come from prepare.batches(), which also keeps the clock: compile and warm up
before the first one, return right after the last. A row's logits at t may depend on its
tokens[:t + 1] alone.
"""

import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare

CUDA = prepare.DEVICE == "cuda"

# Model
DEPTH = 9 if CUDA else 1                # layers
WIDTH = 512 if CUDA else 128            # channels of the residual stream, rounded to whole heads
HEAD_DIM = 128                          # channels of an attention head
MLP_RATIO = 4                           # hidden channels of the MLP, as a multiple of the width
ROPE_BASE = 200000 if CUDA else 10000   # the longest wavelength is 2 pi times this, in tokens
SOFTCAP = 15 if CUDA else 0             # logits stay within +-this; 0: no cap, a tenth less time
NGRAMS = 2                              # hashed tables: of the last 2 tokens, of the last 3, ...
TABLE_ROWS = 2 ** 17                    # rows of each
# Optimizer
BATCH_TOKENS = 2 ** 18 if CUDA else 2 ** 12     # tokens in a step
TRAIN_LEN = 2048 if CUDA else 128       # tokens in a window of training, at most SEQ_LEN
MATRIX_LR = 0.04 if CUDA else 0.02      # Muon: matrices of the layers
MUON_STEPS = 5 if CUDA else 3           # Muon: steps of Newton-Schulz; 3 save 6% of the time
HEAD_LR = 0.008 if CUDA else 0.02       # Adam: output matrix
EMBED_LR = 0.6 if CUDA else 0.2         # Adam: token embeddings, of the input and of the values
TABLE_LR = 0.6                          # Adagrad: n-gram tables
SCALAR_LR = 0.01                        # Adam: one number a layer
BETA1 = 0.8                             # Adam: memory of the mean gradient
BETA2 = 0.95                            # Adam: memory of its square
WEIGHT_DECAY = 0.1                      # of the layers' matrices
WARMDOWN = 0.7                          # share of the budget in which the learning rates fall
FINAL_LR = 0.05                         # where they end, as a share of their peak

HEADS = max(1, round(WIDTH / HEAD_DIM))
CHANNELS = HEADS * 2 * max(1, round(HEAD_DIM / 2))
LENGTH = min(TRAIN_LEN, prepare.SEQ_LEN)
SPARSE = prepare.DEVICE == "cpu"        # update only the table rows in use; a GPU updates all
# bfloat16 is 2.5 times as fast where a CPU has it in hardware, and slower where it does not
BF16 = (torch.cuda.is_bf16_supported(including_emulation=False) if CUDA else
        prepare.DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported())


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels by an angle that grows with the position: arxiv.org/abs/2104.09864."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Attention, then an MLP, each added to the stream."""

    def __init__(self):
        super().__init__()
        hidden = max(1, round(MLP_RATIO * CHANNELS))
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.out = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.up = nn.Linear(CHANNELS, hidden, bias=False)
        self.down = nn.Linear(hidden, CHANNELS, bias=False)
        nn.init.zeros_(self.out.weight)     # every layer begins as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x, value, cos, sin):
        B, T, C = x.shape
        q, k, v = self.qkv(norm(x)).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        v = v + value.view(B, T, HEADS, -1).transpose(1, 2).to(v.dtype)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)     # QK norm: 2302.05442
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square())         # arxiv.org/abs/2109.08668


class GPT(nn.Module):
    """Token and hashed n-gram embeddings, then blocks with value embeddings (modded-nanogpt)."""

    def __init__(self):
        super().__init__()
        vocab = prepare.VOCAB_SIZE
        self.embed = nn.Embedding(vocab, CHANNELS)
        self.tables = nn.ModuleList(
            nn.Embedding(TABLE_ROWS, CHANNELS, sparse=SPARSE) for _ in range(NGRAMS))
        self.values = nn.ModuleList(nn.Embedding(vocab, CHANNELS) for _ in range(DEPTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.1]] * DEPTH))     # of the stream and of x0
        self.head = nn.Linear(CHANNELS, vocab, bias=False)
        for module in (*self.tables, *self.values):
            nn.init.zeros_(module.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        half = CHANNELS // HEADS // 2
        angle = torch.arange(prepare.SEQ_LEN)[:, None] * ROPE_BASE ** -(torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the normalized sum of what the last 1, 2, 3, ... tokens look up."""
        x, key = self.embed(tokens), tokens
        for n, table in enumerate(self.tables, 1):
            key = key * 1000003 + F.pad(tokens, (n, 0))[:, :tokens.size(1)] + 12345     # a hash
            x = x + table((key ^ (key >> 15)) % TABLE_ROWS)
        return norm(x).to(torch.bfloat16 if BF16 else x.dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(prepare.DEVICE, torch.bfloat16, enabled=BF16):
            T = tokens.size(1)
            x = x0 = self.embedded(tokens)
            for block, value, mix in zip(self.blocks, self.values, self.mix):
                x = mix[0] * x + mix[1] * x0
                x = block(x, value(tokens), self.cos[:T], self.sin[:T])
            logits = self.head(norm(x))
            return SOFTCAP * torch.tanh(logits.float() / SOFTCAP) if SOFTCAP else logits


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Muon (kellerjordan.github.io/posts/muon) for the layers' matrices, Adam for the rest.

    Adagrad for the tables: most rows are seen seldom, and it forgets none of their gradients.
    """
    embeddings = [model.embed.weight, *model.values.parameters()]
    optimizers = [
        torch.optim.Muon(model.blocks.parameters(), lr=MATRIX_LR, weight_decay=WEIGHT_DECAY,
                         ns_steps=MUON_STEPS),
        torch.optim.AdamW([{"params": embeddings, "lr": EMBED_LR},
                           {"params": [model.head.weight], "lr": HEAD_LR},
                           {"params": [model.mix], "lr": SCALAR_LR}],
                          betas=(BETA1, BETA2), eps=1e-10, weight_decay=0, fused=True)]
    torch.sparse.check_sparse_tensor_invariants.disable()   # as it is anyway; unsaid, it warns
    if NGRAMS:
        optimizers.append(torch.optim.Adagrad(model.tables.parameters(), lr=TABLE_LR))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def tokens_at_once() -> int:
    """Return for how many tokens the activations and logits fill at most half of the memory."""
    memory = torch.cuda.get_device_properties(0).total_memory if CUDA else 2 ** 34
    bytes_of_one = (40 * DEPTH * CHANNELS + 8 * prepare.VOCAB_SIZE) * (1 if BF16 else 2)
    return 2 ** int(math.log2(memory / 2 / bytes_of_one))


def take_step(loss_of, optimizers, x: torch.Tensor, y: torch.Tensor, rate: float) -> torch.Tensor:
    """Take one step at `rate` times the peak learning rates; return the loss of its last part."""
    rows = max(1, tokens_at_once() // x.size(1))
    for part, targets in zip(x.split(rows), y.split(rows)):
        loss = loss_of(part, targets)
        (loss * len(part) / len(x)).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train() -> nn.Module:
    model = GPT().to(prepare.DEVICE)
    optimizers = make_optimizers(model)
    rows = max(1, BATCH_TOKENS // LENGTH)

    def loss_of(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    if CUDA:    # compile and warm up on random tokens; at rate 0 no weight changes
        loss_of = torch.compile(loss_of, dynamic=False)
        x = torch.randint(prepare.VOCAB_SIZE, (rows, LENGTH + 1), device=prepare.DEVICE)
        take_step(loss_of, optimizers, x[:, :-1], x[:, 1:], 0.0)
        optimizers = make_optimizers(model)     # without a memory of it
    loss, printed = None, time.monotonic()
    for step, (x, y, progress) in enumerate(prepare.batches(rows, LENGTH)):
        if step and time.monotonic() - printed > 2:     # seldom: it waits for the step before
            printed = time.monotonic()
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
        rate = max(FINAL_LR, min(1, (1 - progress) / WARMDOWN))
        loss = take_step(loss_of, optimizers, x, y, rate)
    return model


if __name__ == "__main__":
    prepare.by_hand(__file__)
