import random
import re

import pytest
from conftest import TINY

import autoresearch as ar


def moves_and_programs(source: str, cuda: bool = False) -> list[tuple[str, str]]:
    return list(ar.random_moves(random.Random(0), source, cuda))


def numbers(source: str) -> dict[str, float]:
    """Return the names that a program assigns at top level, and their values."""
    names = {"CUDA": False}
    exec(source, names)
    return {name: names[name] for name in names if not name.startswith("__")}


def test_it_finds_the_knobs_in_force_and_moves_them_in_their_own_way():
    source = ('"""\nV = 1.2.3\nW = 007\n"""\nA = 8 if CUDA else 2\nB = 2 ** 15  # x\nC = 0.95\n'
              'D = "x"\ne = 3\nF = A * 2\nG = 0\n')
    for cuda, a in (False, "2"), (True, "8"):
        texts = " ".join(text for text, _ in moves_and_programs(source, cuda))
        assert dict(re.findall(r"(\w+) (\S+) ->", texts)) == {"A": a, "B": "32768", "C": "0.95"}
    assert (ar.moved(4096, 1.3), ar.moved(4096, 0.7)) == (8192, 2048)
    assert (ar.moved(7, 1.3), ar.moved(7, 0.7), ar.moved(1, 0.5)) == (9, 5, 1)
    assert (ar.moved(0.95, 2), ar.moved(0.95, 0.5)) == (0.9744, 0.9048)     # odds: 19, 38, 9.5
    assert (ar.moved(0.02, 1.5), ar.moved(2.0, 1.5)) == (0.0297, 3.0)


def test_it_always_finds_a_program_that_is_new():
    seen = {ar.program_of(TINY)[0]}
    for number in range(1, 60):
        candidates = ar.random_moves(random.Random(number), TINY, False)
        text, source = next(c for c in candidates if ar.program_of(c[1])[0] not in seen)
        seen.add(ar.program_of(source)[0])
        moves = re.findall(r"\w+ (\S+) -> ([^\s,]+)", text)
        assert moves and all(old != new for old, new in moves)


@pytest.mark.parametrize("line", [
    "CONFIG['WARMUP'] = 3", "OPTIONS.LR = 3", "A, B = 3, 4", "[A] = [3]", "A: int = 3", "A = B = 3",
    "A += 3", "A = True", "A = ...", "A = 3j", "A = -3", "A = 0", "A = 1.2.3", "A = x(3)",
    "A = 1e999", "A = 10.0 ** 400", "A = 9 ** 999999999", "A = 2 ** 0.5", f"A = 1{'0' * 400}",
    "A = 3; B = 4", "    A = 3", "A = 3 if CUDA else x()"])
def test_what_is_no_plain_number_is_left_alone(line):
    moves = moves_and_programs(f"{line}\nLAST = 7\n")
    assert moves and all(text.startswith("LAST 7 -> ") for text, _ in moves)
    assert all(line in changed for _, changed in moves)


@pytest.mark.parametrize("source", [
    "A = 10\nB = 20", "A = 10  # größer\nB = 0.5\n", "A = 1.5e-3\nB = 1e-10\n", "A = 3\nA = 4\n",
    "# a\x0cb\u2028c\nA = 10  # d\nB = 2 ** 15\n", "A = 8 if CUDA else 2\nB = 5 # x\n"])
def test_a_program_has_the_numbers_that_its_description_says(source):
    moves = moves_and_programs(source)
    assert moves
    for text, changed in moves:
        said = {name: float(new) for name, new in re.findall(r"(\w+) \S+ -> ([^\s,]+)", text)}
        assert said and numbers(changed) == numbers(source) | said
