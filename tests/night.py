"""N-gram counts of the whole text, mixed with copies from the window: the file under research.

    python train.py         # train it once and print the score

train() returns a model: int64 tokens (B, T) -> float logits (B, T, VOCAB_SIZE). Those at t may
depend on tokens[:, :t + 1] alone. prepare.batches() keeps the clock.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare

V = prepare.VOCAB_SIZE
# Counts
COUNT_TOKENS = 2 ** 24  # read at most so many tokens
READ_SHARE = 0.15       # and for at most this share of the budget
BUILD_SHARE = 0.7       # begin no higher order after this share
ORDERS = 8              # longest context, in tokens
HELD = 16               # one long window in so many is not counted: the mixture learns from it
COPY = 8                # longest match within the window that is told apart
# Optimizer
ROWS = 8                # windows in a step
LR = 0.4                # Adagrad
WARMDOWN = 0.7559       # share of the budget in which the learning rate falls
FINAL_LR = 0.05         # where it ends, as a share of its peak


def train() -> nn.Module:
    with torch.device(prepare.DEVICE):
        model = Mixture()
    optimizer = torch.optim.Adagrad(model.parameters(), LR)
    windows, read, data, step = [], 0, None, 0
    for x, y, progress in prepare.batches(1, 64 * prepare.SEQ_LEN):     # of several files each
        if data is None:        # read
            windows.append(torch.cat((x, y[:, -1:]), 1))
            read += x.numel()
            if read >= COUNT_TOKENS or progress > READ_SHARE:
                data = torch.cat(windows)
                windows = None
                share = max(1, len(data) // HELD)
                held, data = data[:share], data[share:]
                held = held.unfold(1, prepare.SEQ_LEN + 1, prepare.SEQ_LEN).flatten(0, 1)
                held = held[torch.randperm(len(held), device=held.device)]
                inputs, targets = data[:, :-1], data[:, 1:]
                hashes = torch.zeros_like(inputs)
                order = 0
        elif order < ORDERS and progress < BUILD_SHARE:     # count
            hashes = longer(hashes, inputs, order)
            order += 1
            before = F.pad(inputs, (order, 0))[:, :inputs.size(1)]
            model.add(hashes, targets, before, order < ORDERS)
            print(f"order {order}  progress {progress:.3f}", flush=True)
        else:                   # learn
            start = step * ROWS % max(1, len(held) - ROWS + 1)
            batch = held[start:start + ROWS]
            loss = -model(batch[:, :-1], batch[:, 1:]).mean()
            loss.backward()
            rate = max(FINAL_LR, min(1, (1 - progress) / WARMDOWN))
            optimizer.param_groups[0]["lr"] = LR * rate
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                print(f"step {step:5d}  loss {loss.item():.4f}  progress {progress:.3f}", flush=True)
            step += 1
    return model


def longer(hashes: torch.Tensor, tokens: torch.Tensor, n: int) -> torch.Tensor:
    """Turn hashes of the last n tokens, in place, into those of the last n + 1."""
    hashes.mul_(6364136223846793005).add_(F.pad(tokens, (n, 0))[:, :tokens.size(1)]).add_(1)
    return hashes.bitwise_and_(2 ** 40 - 1)     # leave room for two tokens in 63 bits


def refine(p, hashes, order: tuple, shift, slope, after, dense: bool):
    """Return p (N, V), or (N, 1) of those that come after, interpolated with the counts of the
    contexts (B, T), which of them are known, and the bucket of their counts. How often earlier
    places knew what came after them shifts the weights, too."""
    keys, ends, discount = order
    first = hashes.flatten() * V
    low, high = torch.searchsorted(keys, first), torch.searchsorted(keys, first + V)
    length = high - low
    total = (ends[high] - ends[low]).clamp(min=1).float()
    wanted = first + after.flatten()
    index = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    found = keys[index] == wanted
    known = (length > 0).view(hashes.shape).float()
    hits = known * (2 * found.view(hashes.shape) - 1)
    skill = (hits.cumsum(1) - hits) / (known.cumsum(1) + 4)     # at earlier places
    bucket = 10 * length.clamp(1, 8).log2().long() + total.log2().long().clamp(max=9)
    usual = (discount * length / total).clamp(1e-5, 1 - 1e-5)    # share of the shorter contexts
    share = (usual.logit() + shift[bucket] + slope * skill.flatten()).sigmoid()
    p = p * torch.where(length > 0, share, 1.0)[:, None]
    scale = (1 - share) / (1 - usual) / total
    if dense:
        row = torch.arange(len(p), device=p.device).repeat_interleave(length)
        index = torch.arange(len(row), device=p.device) + (low - length.cumsum(0) + length)[row]
        count = ends[index + 1] - ends[index]
        p = p.view(-1).index_add(0, row * V + keys[index] % V, (count - discount) * scale[row])
        return p.view(-1, V), length > 0, bucket
    count = ends[index + 1] - ends[index]
    return p + (found * (count - discount) * scale)[:, None], length > 0, bucket


def matches(tokens: torch.Tensor) -> torch.Tensor:
    """Return how many last tokens positions t and s have in common, (B, T, T), at most COPY."""
    same = run = tokens[:, :, None] == tokens[:, None]
    total = run.long()
    for _ in range(COPY - 1):
        run = same & F.pad(run, (1, 0, 1, 0))[:, :-1, :-1]
        total += run
    return total


class Copies(nn.Module):
    """Mix in what followed earlier places of the window."""

    def __init__(self, trust: float):
        super().__init__()
        length = torch.arange(COPY + 1.0)
        self.trust = nn.Parameter(trust * length)   # log weight of a match
        self.age = nn.Parameter(torch.tensor(0.5))  # its power of the distance
        self.fit = nn.Parameter(0.5 / (1 + length) ** 2)    # its power of the bigram probability
        self.kin = nn.Parameter(torch.tensor(1.0))  # its power of the overlap of last tokens
        self.appeal = nn.Parameter(torch.zeros(V))  # log weight of the token to be copied
        self.gate = nn.Parameter(
            0.2 * trust * length - 2 - 0.2 * torch.arange(ORDERS + 0.0)[:, None])
        self.lean = nn.Parameter(torch.zeros(V))    # the last token's part in the gate
        self.proof = nn.Parameter(torch.zeros(40))  # the longest known context's part
        self.agree = nn.Parameter(torch.zeros(COPY + 1))        # the part of copies that agree
        self.form = nn.Parameter(torch.full((COPY + 1,), 0.3))  # of how well copies did so far

    def forward(self, p, mask, match, fits, alike, depth, proof, tokens, targets):
        place = torch.arange(tokens.size(1), device=tokens.device)
        far = (place[:, None] - place).clamp(min=1).log()
        longest = (match * mask).amax(-1)
        after = F.pad(tokens[:, 1:], (0, 1))[:, None]
        weight = self.trust[match] - self.age * far + self.appeal[after]
        weight = (weight + self.fit[match] * fits + self.kin * alike).exp() * mask
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-9)
        if targets is None:
            copied = torch.zeros_like(p).scatter_add(2, after.expand_as(match), weight)
        else:
            copied = (weight * (after == targets[:, :, None])).sum(-1, keepdim=True)
        best = after[:, 0].gather(1, weight.argmax(-1))[:, :, None]
        sure = (weight * (after == best)).sum(-1)
        was, had = p[:, :-1], copied[:, :-1]    # of what came next, known one place later
        if targets is None:
            was, had = was.gather(2, tokens[:, 1:, None]), had.gather(2, tokens[:, 1:, None])
        form = ((had + 0.01) / (was + 0.01)).log().squeeze(-1).cumsum(1) / (place[1:] + 8)
        gate = self.gate[depth, longest] + self.lean[tokens] + self.agree[longest] * sure
        gate = gate + self.proof[proof] + self.form[longest] * F.pad(form, (1, 0))
        return torch.lerp(p, copied, (gate.sigmoid() * mask.any(-1))[:, :, None])


class Mixture(nn.Module):
    """Kneser-Ney n-grams, mixed with what followed similar places in the window."""

    def __init__(self):
        super().__init__()
        self.base = torch.full((V, V), 1 / V)   # P(next | last token)
        self.alike = torch.zeros(V, V)  # log overlap of what follows two tokens
        self.ready = False
        self.orders = []        # of longer contexts: sorted keys, cumulated counts, discount
        self.shift = nn.Parameter(torch.zeros(ORDERS, 40))      # of the logit of backing off
        self.slope = nn.Parameter(torch.full((ORDERS,), -0.5))  # of that shift by earlier success
        self.anywhere, self.matching = Copies(0.5), Copies(3)

    def add(self, hashes: torch.Tensor, targets: torch.Tensor, before: torch.Tensor, distinct: bool):
        """Count what follows contexts, one token longer than last time; once per token `before`."""
        keys = (hashes * V ** 2).add_(targets, alpha=V).add_(before).flatten().cpu().numpy()
        keys.sort()
        keys = torch.from_numpy(keys).to(prepare.DEVICE)
        if distinct:
            keys = torch.unique_consecutive(keys)
        keys.div_(V, rounding_mode="floor")
        keys, counts = torch.unique_consecutive(keys, return_counts=True)
        once, twice = (counts == 1).sum().item(), (counts == 2).sum().item()
        order = keys, F.pad(counts.cumsum(0), (1, 0)), (once + 1) / (once + 2 * twice + 2)
        if self.ready:
            self.orders.append(order)
        else:       # the shortest contexts get a dense table
            tokens = torch.arange(V, device=prepare.DEVICE)[:, None]
            unigram = torch.bincount(keys % V, minlength=V) + 0.5
            base = (unigram / unigram.sum()).expand(V, V)
            with torch.no_grad():
                hashes = longer(torch.zeros_like(tokens), tokens, 0)
                self.base = refine(
                    base, hashes, order, torch.zeros_like(self.shift[0]), 0, tokens, True)[0]
            rows = self.base.sqrt()
            self.alike = (rows @ rows.T).clamp(max=1).log()
            self.ready = True

    def forward(self, tokens: torch.Tensor, targets=None) -> torch.Tensor:
        """Return log P of every next token, (B, T, V), or of the targets, (B, T, 1)."""
        last = tokens.flatten()
        p = self.base[last] if targets is None else self.base[last, targets.flatten()][:, None]
        depth, proof = torch.zeros_like(last), torch.zeros_like(last)
        soon = F.pad(tokens[:, 1:], (0, 1)) if targets is None else targets
        hashes = longer(torch.zeros_like(tokens), tokens, 0)
        for n, order in enumerate(self.orders, 1):
            hashes = longer(hashes, tokens, n)
            p, known, bucket = refine(
                p, hashes, order, self.shift[n], self.slope[n], soon, targets is None)
            depth += known
            proof = torch.where(known, bucket, proof)
        depth, proof = depth.view(tokens.shape), proof.view(tokens.shape)
        match = matches(tokens)
        past = torch.ones_like(match, dtype=torch.bool).tril(-1)
        fits = self.base[tokens[:, :, None], F.pad(tokens[:, 1:], (0, 1))[:, None]].log()
        known = match, fits, self.alike[tokens[:, :, None], tokens[:, None]], depth, proof
        p = self.anywhere(p.view(*tokens.shape, -1), past, *known, tokens, targets)
        return self.matching(p, past & (match > 0), *known, tokens, targets).log()


if __name__ == "__main__":
    prepare.by_hand(__file__)
