"""A short, strong GPT: the file under research.

    python train.py         # train it once and print the score

The contract: train() returns a model with model(tokens) -> logits, (B, T) int64 -> (B, T, VOCAB_SIZE). Batches come from
prepare.batches(), which also keeps the clock: compile and warm up before the first one, return right after the last.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare

CUDA = prepare.DEVICE == "cuda"

# Model
DEPTH = 8 if CUDA else 2            # layers
WIDTH = 512 if CUDA else 256        # channels of the residual stream
HEAD_DIM = 128 if CUDA else 64      # channels of an attention head
MLP_RATIO = 4                       # channels of the MLP, in widths
ROPE_BASE = 200000 if CUDA else 10000           # longest wavelength of the position encoding, in tokens / 2 pi
SOFTCAP = 15                        # logits stay between -SOFTCAP and SOFTCAP
BIGRAMS = 2 ** 18 if CUDA else 2 ** 15  # rows of the hashed table of token pairs
# Optimizer
BATCH_TOKENS = 2 ** 18 if CUDA else 2 ** 12     # tokens in a step
MATRIX_LR = 0.02                    # Muon
EMBED_LR = 0.3                      # Adam, input look-ups
HEAD_LR = 0.008                     # Adam, output matrix
WEIGHT_DECAY = 0.1                  # of matrices
WARMDOWN = 0.6                      # share of the budget in which the learning rate falls to zero


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = WIDTH // HEAD_DIM
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, MLP_RATIO * WIDTH, bias=False)
        self.down = nn.Linear(MLP_RATIO * WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = self.qkv(norm(x)).view(B, T, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.down(F.relu(self.up(norm(x))).square())


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(prepare.VOCAB_SIZE, WIDTH)
        self.bigram = nn.Embedding(BIGRAMS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, prepare.VOCAB_SIZE, bias=False)
        nn.init.zeros_(self.bigram.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        freq = ROPE_BASE ** -torch.linspace(0, 1, HEAD_DIM // 2)
        angle = torch.arange(prepare.SEQ_LEN)[:, None] * freq
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        T = tokens.size(1)
        before = F.pad(tokens, (1, 0))[:, :-1]
        pair = (tokens * 1000003 + before * 7919) % BIGRAMS
        x = norm(self.embed(tokens) + self.bigram(pair))
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(norm(x)).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)


def train():
    model = GPT().to(prepare.DEVICE)
    matrices = list(model.blocks.parameters())
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW([{"params": [model.embed.weight, model.bigram.weight], "lr": EMBED_LR},
                           {"params": [model.head.weight], "lr": HEAD_LR}],
                          betas=(0.8, 0.95), weight_decay=0, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    for step, (x, y, progress) in enumerate(prepare.batches(BATCH_TOKENS // prepare.SEQ_LEN)):
        with torch.autocast(prepare.DEVICE, torch.bfloat16, enabled=CUDA):
            logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, (1 - progress) / WARMDOWN)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    return model


if __name__ == "__main__":
    prepare.by_hand(__file__)
