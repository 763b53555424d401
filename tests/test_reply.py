import ast

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
    CLEAN, FILE, CLEAN.replace("\n", "\r\n"), "\ufeff" + CLEAN, HEAD + 2 * BLOCKS,
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
    ("<think>\n" + CLEAN, "0 SEARCH"), (CLEAN + FILE, "1 fence"), (CLEAN[:-16], "a block is"),
    (CLEAN.replace("return x * 2", "..."), "left out"),
    (HEAD + "```\ndef train():\n    return Model()\n```", "Model.. is called"),
    (f"{HEAD}```\n{SOURCE}```", "changes nothing"), (CLEAN.replace("LR = 0.03", "LR = ("), "parse"),
    (CLEAN.replace("LR = 0.02", "LR = 0.05"), "at 0 places(.|\n)*LR = 0.02"),
    (CLEAN + BLOCKS.replace("0.03", "0.04"), "other blocks"),
    (CLEAN.replace("return x * 2", f"pass\n{LR_LINE}"), "at 2 places"),
    (HEAD + INSERTS + INSERTS.replace("A =", "B ="), "order"),
    (CLEAN.replace("E\n\n<", "E\n\nAlternatively:\n\n<"), "one proposal")])
def test_an_unclear_reply_is_sent_back(reply, reason):
    with pytest.raises(ar.Unusable, match=reason):
        ar.apply_reply(reply, SOURCE)


def test_what_strings_and_comments_hold_is_not_touched_and_a_block_may_delete():
    source = SOURCE.replace("# channels", "# a\x0cb\u2028c") + "TEXT = 'a\tb #1'\n"
    reply = "DESCRIPTION: x\n\n<<<<<<< SEARCH\n{}\n=======\n{}>>>>>>> REPLACE\n"
    line = "WIDTH = 16              # a\x0cb\u2028c"
    assert ar.apply_reply(reply.format(line, line.replace("16", "8") + "\n"), source)[1] == \
        source.replace("16", "8")
    assert ar.apply_reply(reply.format(line, ""), source)[1] == source.replace(line + "\n", "")
    with pytest.raises(ar.Unusable, match="at 0 places"):
        ar.apply_reply(reply.format("TEXT = 'a\tb #2'", "TEXT = ''\n"), source)


def test_without_a_description_the_first_sentence_names_it_and_the_idea_is_kept():
    assert ar.apply_reply("It was slow. Really.\n\n" + BLOCKS, SOURCE)[0] == "It was slow."
    ideas = [ar.parse_reply(reply)[1] for reply in (CLEAN, FILE, BLOCKS)]
    assert ideas == ["It was slow.", "It was slow.", ""]
