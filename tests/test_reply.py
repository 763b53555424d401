import ast
import contextlib
import time

import pytest

import autoresearch as ar

SOURCE = '''import prepare

WIDTH = 16              # channels
LR = 0.02               # of each weight


class Model:
    def forward(self, x):
        x = x + self.up(x)      # up
        return x


def train():
    return Model()
'''
BLOCKS = """<<<<<<< SEARCH
LR = 0.02               # of each weight
=======
LR = 0.03               # of each weight
>>>>>>> REPLACE

<<<<<<< SEARCH
        x = x + self.up(x)      # up
        return x
=======
        x = x + self.up(x)
        return x * 2
>>>>>>> REPLACE
"""
HEAD = "DESCRIPTION: faster, louder\n\nIt was slow.\n\n"
EDITED = SOURCE.replace("0.02", "0.03").replace("return x\n", "return x * 2\n")
CLEAN = HEAD + BLOCKS
LR_LINE = "LR = 0.02               # of each weight"
INSERTS = f"<<<<<<< SEARCH\n{LR_LINE}\n=======\nA = 1\n{LR_LINE}\n>>>>>>> REPLACE\n"
FILE = f"{HEAD}```python\n{EDITED}```\n"


@pytest.mark.parametrize("reply", [
    CLEAN, FILE, CLEAN.replace("\n", "\r\n"), "\ufeff" + CLEAN,
    CLEAN.replace("DESCRIPTION:", "## **Description**:"), CLEAN.replace("PTION: ", "PTION:\n"),
    f"```\n{CLEAN}```\n", f"{HEAD}```diff\n{BLOCKS}```\n", HEAD + BLOCKS.replace("\n\n", "\n\n2. "),
    CLEAN.replace("SEARCH", "train.py").replace("REPLACE", "END"),
    CLEAN.replace("<<<<<<<", "<<<<<").replace("=======", "========"),
    f"DESCRIPTION: no\n{BLOCKS.replace('3', '9')}</think>\n{CLEAN}",
    HEAD + BLOCKS.replace("        ", ""), HEAD + BLOCKS.replace("        ", "\t\t"),
    CLEAN.replace("        return x * 2", "\t\treturn x * 2"),
    HEAD + BLOCKS.replace("  #", "\xa0#"), HEAD + BLOCKS.replace("SEARCH\n", "SEARCH\n\n"),
    HEAD + BLOCKS.replace("      # up", ""), FILE.replace("```", "~~~"),
    f"{HEAD}For example:\n```\nx = 1\n```\n\n```py title='train.py'\n{EDITED}```\n",
    CLEAN.replace("        return x *", "        # the bias is 0, 1, ..., 9\n        return x *"),
    f"```python\n# DESCRIPTION: faster, louder\n{EDITED}```"])
def test_an_edit_is_found_in_whatever_it_is_wrapped(reply):
    description, source = ar.apply_reply(reply, SOURCE)
    assert description == "faster, louder"
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(EDITED))


@pytest.mark.parametrize("reply, reason", [
    ("<think>\n" + CLEAN, "one proposal"), (CLEAN + FILE, "one proposal"),
    (FILE + FILE, "one proposal"), (CLEAN[:-16], "one proposal"), (HEAD, "one proposal"),
    (CLEAN.replace("<", "&lt;").replace(">", "&gt;"), "one proposal"),
    (CLEAN.replace("return x * 2", "..."), "stands for"),
    (HEAD + "```\ndef train():\n    return Model()\n```", "one proposal"),
    (f"{HEAD}```\n{SOURCE}```", "changes nothing"), (CLEAN.replace("LR = 0.03", "LR = ("), "parse"),
    (CLEAN.replace("LR = 0.02", "LR = 0.05"), "at 0 places(.|\n)*LR = 0.05"),
    (CLEAN + BLOCKS.replace("0.03", "0.04"), "other blocks"),
    (CLEAN.replace("return x * 2", f"pass\n{LR_LINE}"), "at 2 places"),
    (HEAD + 2 * BLOCKS, "at 0 places"), (HEAD + INSERTS + INSERTS.replace("A =", "B ="), "order"),
    # A part of a proposal is not taken for all of it, and one of two is not chosen.
    (CLEAN.replace("E\n\n<", "E\n\nAlternatively:\n\n<"), "one proposal"),
    (CLEAN.replace("E\n\n<", "E\n\n2. Option\n\n<"), "one proposal"),
    (CLEAN.replace("<<<<<<< S", "> <<<<<<< S", 1), "one proposal"),
    (f"{HEAD}```python\n{EDITED}", "one proposal"),
    (f"{HEAD}```python\n{EDITED[EDITED.index('class'):]}```\n", "one proposal")])
def test_an_unclear_reply_is_sent_back(reply, reason):
    with pytest.raises(ar.Unusable, match=reason):
        ar.apply_reply(reply, SOURCE)


def test_what_strings_and_comments_hold_is_not_touched_and_a_block_may_delete():
    source = SOURCE.replace("# channels", "# a\x0cb\u2028c") + "TEXT = 'a\tb #1'\n"
    reply = "DESCRIPTION: x\n\n<<<<<<< SEARCH\n{}\n=======\n{}>>>>>>> REPLACE\n"
    line = "WIDTH = 16              # a\x0cb\u2028c"
    assert ar.apply_reply(reply.format(line, line.replace("16", "8") + "\n"), source)[1] == \
        source.replace("16", "8")
    assert ar.apply_reply(reply.format(line, ""), source)[1] == source.replace(line, "")
    with pytest.raises(ar.Unusable, match="at 0 places"):
        ar.apply_reply(reply.format("TEXT = 'a    b #1'", "TEXT = ''\n"), source)


def edit(search: str, replace: str) -> str:
    return f"DESCRIPTION: x\n\n<<<<<<< SEARCH\n{search}\n=======\n{replace}\n>>>>>>> REPLACE\n"


@pytest.mark.parametrize("value", [
    "1" + " + 1" * 5000, "(" * 500 + ")" * 500, "-" * 100_000 + "1", "0x" + "f" * 9000,
    "'\0'", "(", "1__0"])
def test_what_python_cannot_read_or_write_is_sent_back(value):
    with pytest.raises(ar.Unusable, match="does not parse"):
        ar.apply_reply(edit(LR_LINE, f"LR = {value}"), SOURCE)


def test_a_file_that_is_not_utf_8_is_refused():
    with pytest.raises(ar.Unusable, match="does not parse: 'utf-8' codec"):
        ar.apply_reply(CLEAN, SOURCE.replace("# channels", "# gr\udcf6\udcdfe"))


@pytest.mark.parametrize("piece", [
    ".", "\n", "```x\n", "- <<<<<\n", " ", "*", "'", "</think", "DESCRIPTION\n", "# same\n", "\0"])
def test_no_repetition_makes_it_slow_or_leaves_it_with_another_error(piece):
    many = piece * (20_000 // len(piece))
    start = time.process_time()
    for reply in (many, HEAD + BLOCKS + many, edit(LR_LINE, "A = 1\n# same " + many + " x"),
                  edit(many, "A = 1"), f"DESCRIPTION: a{many}b\n{BLOCKS}", f"a{many}b\n{BLOCKS}"):
        with contextlib.suppress(ar.Unusable):
            ar.apply_reply(reply, SOURCE)
    assert time.process_time() - start < 2      # what is quadratic takes 3 seconds and more


OLD = "        x = x + self.up(x)      # up\n        return x"


@pytest.mark.parametrize("comment", [
    "# all tables get the same learning rate", "# the rest is noise", "# the bias is 0, 1, 2, ...",
    "# see above: the other half", "# the remaining heads share one existing projection"])
def test_a_comment_that_describes_code_is_no_gap(comment):
    new = f"        {comment}\n        x = x + self.up(x)      # up\n        return x * 2"
    assert ar.apply_reply(edit(OLD, new), SOURCE)[1] == SOURCE.replace(OLD, new)


def test_an_index_is_no_beginning_of_a_thought():
    new = "        x = x + self.up(x[reason])\n        return x"
    assert "self.up(x[reason])" in ar.apply_reply(edit(OLD, new), SOURCE)[1]


@pytest.mark.parametrize("line", [
    "...", "[...]  # as above", "…", "# ...", "# ... the return ...", "pass  # same as before",
    "# rest of the code unchanged", "# the rest of the file is unchanged", "# unchanged",
    "# forward() as before", "# return x is unchanged", "# existing code here ...", "# return ..."])
def test_a_line_that_stands_for_code_is_sent_back(line):
    for new in (f"        x = self.up(x)\n        {line}", f"        {line}"):
        with pytest.raises(ar.Unusable, match="stands for"):
            ar.apply_reply(edit(OLD, new), SOURCE)
    file = SOURCE.replace("0.02", "0.03").replace(OLD, f"        return self.up(x)\n        {line}")
    with pytest.raises(ar.Unusable, match="stands for"):
        ar.apply_reply(f"{HEAD}```python\n{file}```\n", SOURCE)


def test_a_fence_inside_a_docstring_cuts_the_file_which_is_sent_back():
    file = f'"""A model.\n\n```\npython train.py\n```\n"""\n{EDITED}'
    with pytest.raises(ar.Unusable, match="does not parse"):
        ar.apply_reply(f"{HEAD}```python\n{file}```\n", SOURCE)


def test_without_a_description_the_first_words_name_it_and_the_idea_is_kept():
    assert ar.apply_reply("It was slow. Really.\n\n" + BLOCKS, SOURCE)[0] == "It was slow. Really."
    ideas = [ar.read_reply(reply, SOURCE)[1] for reply in (CLEAN, FILE, BLOCKS)]
    assert ideas == ["It was slow.", "It was slow.", ""]
