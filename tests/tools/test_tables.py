"""Tables and text for terminals and Markdown."""

import pytest

from tools.tables import code_block, escaped, markdown, plain, print_lines


def test_cells_can_not_change_a_terminal(capsys):
    assert plain([["run", "why"], ["\x1b[31m", "a\nb\t"]]).splitlines()[2] == r"\x1b[31m  a\nb\t"
    print_lines("one\ntwo\x1b[2J")
    assert capsys.readouterr().out == "one\ntwo\\x1b[2J\n"


@pytest.mark.parametrize(
    ("cell", "source"),
    [
        ("a|b\nc", r"a\|b\\nc"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("<img src=x>", r"\<img src=x\>"),
        ("`a` **b** ~~c~~ &amp; \\|", r"\`a\` \*\*b\*\* \~\~c\~\~ \&amp; \\\|"),
        ("resnet18_cifar10 _a_ acc@1 99.5 %", r"resnet18_cifar10 \_a\_ acc@1 99.5 %"),
    ],
)
def test_cells_are_shown_as_they_are_in_markdown(cell, source):
    assert escaped(cell) == source
    assert markdown([["name"], [cell]]).splitlines()[2] == f"| {source} |"


def test_no_line_closes_a_block_of_code():
    assert code_block("a: '```'\n````b\n", "yaml") == "`````yaml\na: '```'\n````b\n`````"
