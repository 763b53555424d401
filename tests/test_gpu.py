"""What train.py would do on a GPU, as far as a CPU can show it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare  # noqa: E402
import train  # noqa: E402

PARAMETERS = 207_000_000    # of the model that CUDA gets: 9 layers of 512 channels, tables of 2^17


@pytest.fixture
def gpu(monkeypatch):
    """The constants of a GPU that computes in bfloat16."""
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 8192)
    for name, value in {"CUDA": True, "DEPTH": 9, "CHANNELS": 512, "BATCH_TOKENS": 2 ** 18,
                        "DTYPE": torch.bfloat16}.items():
        monkeypatch.setattr(train, name, value)


def make_small(monkeypatch):
    for name, value in {"CHANNELS": 32, "HEADS": 2, "PAIRS": 8, "TABLE_ROWS": 64}.items():
        monkeypatch.setattr(train, name, value)


def tokens(monkeypatch, free: float, total: float = 8.5e10) -> tuple[int, int]:
    """Return the tokens of a batch and of a part on a GPU with so many bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(total)))
    rows, part = train.batch_sizes(PARAMETERS)
    return rows * train.LENGTH, part * train.LENGTH


@pytest.mark.parametrize("gib, part", [(8, 2 ** 13), (12, 2 ** 14), (16, 2 ** 14), (24, 2 ** 15),
                                       (80, 2 ** 17), (141, 2 ** 17), (2, 2 ** 7)])
def test_activations_get_half_of_what_weights_and_states_leave_free(gpu, monkeypatch, gib, part):
    weights = 4 * PARAMETERS
    assert tokens(monkeypatch, gib * 2 ** 30 - weights)[1] == part


def test_float32_takes_half_as_many_tokens_at_a_time(gpu, monkeypatch):
    half = tokens(monkeypatch, 16 * 2 ** 30)[1]
    monkeypatch.setattr(train, "DTYPE", torch.float32)
    assert tokens(monkeypatch, 16 * 2 ** 30)[1] == half // 2


@pytest.mark.parametrize("gib, log2", [(141, 18), (79.1, 18), (48, 17), (39.4, 17), (23.5, 16),
                                       (15.8, 15), (11.8, 15), (7.8, 14)])
def test_a_smaller_card_takes_smaller_steps(gpu, monkeypatch, gib, log2):
    assert tokens(monkeypatch, 1e10, gib * 2 ** 30)[0] == 2 ** log2


def test_a_step_is_as_large_as_the_knob_says_on_a_large_card_and_on_a_cpu(gpu, monkeypatch):
    monkeypatch.setattr(train, "BATCH_TOKENS", 3 * 2 ** 16)
    assert tokens(monkeypatch, 1e10, 8.5e10)[0] == 3 * 2 ** 16
    monkeypatch.setattr(train, "CUDA", False)
    assert tokens(monkeypatch, 0, 0) == (3 * 2 ** 16, 3 * 2 ** 16)


@pytest.mark.parametrize("free, part", [(8.4e10, 2 ** 17), (1.5e9, 2 ** 14)])
def test_a_full_card_takes_the_same_batch_in_smaller_parts(monkeypatch, free, part):
    make_small(monkeypatch)
    for name, value in {"CUDA": True, "BATCH_TOKENS": 2 ** 18, "DTYPE": torch.float32}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(8.5e10)))
    asked, parts = [], []

    def batches(rows, length):
        asked.append(rows * length)
        yield None, None, 0.0

    monkeypatch.setattr(prepare, "batches", batches)

    def take_step(loss_of, optimizers, x, y, part, rate):
        parts.append(part * train.LENGTH)
        return torch.zeros(())

    monkeypatch.setattr(train, "take_step", take_step)
    train.train()
    assert asked == [2 ** 18] and parts == [part]


def test_the_model_is_made_on_the_device(monkeypatch):
    make_small(monkeypatch)
    monkeypatch.setattr(prepare, "DEVICE", "meta")
    monkeypatch.setattr(prepare, "batches", lambda rows, length: ())
    monkeypatch.setattr(train, "make_optimizers", lambda model: [])
    assert {t.device.type for t in train.train().state_dict().values()} == {"meta"}


def test_a_step_in_parts_with_a_loss_scale_moves_the_weights_alike(monkeypatch):
    """Muon, Adam and Adagrad: 6 rows at once, or 2 at a time with gradients 1024 times as large."""
    make_small(monkeypatch)
    monkeypatch.setattr(train, "DTYPE", torch.float32)      # bfloat16 rounds by more than 2%
    x = torch.randint(prepare.VOCAB_SIZE, (6, 17), generator=torch.Generator().manual_seed(0))
    moved = []
    for rows, scale in (6, 1), (2, 1024):
        monkeypatch.setattr(train, "LOSS_SCALE", scale)
        torch.manual_seed(0)
        model = train.GPT()
        optimizers = train.make_optimizers(model)

        def loss_of(x, y, model=model):
            return train.F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):      # the first step leaves the zero matrices' inputs without a gradient
            train.take_step(loss_of, optimizers, x[:, :-1], x[:, 1:], rows, 1.0)
        moved.append([p.detach() - b for p, b in zip(model.parameters(), before)])
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, *moved):
        if name == "mix":   # norm() follows it, so that its gradient is rounding alone
            continue
        assert one.norm() > 0 and (one - other).norm() < 0.02 * one.norm()
