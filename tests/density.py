"""How dense code is to read: python tests/density.py FILE ...

Lines of code alone count, without docstrings, comments and blank lines.
    tokens          the mean number of tokens in a line
    densest tenth   the number of tokens that nine of ten lines stay below
    over 30 tokens  the share of lines with more, in percent
    wide            the share of lines beyond 100 columns, in percent
    packed          per 100 lines: `a, b = x, y`, several names bound to several expressions
    nested          per 100 lines: comprehensions, or conditional expressions, inside comprehensions
For comparison: nanoGPT has 10.9 tokens a line (model.py) and 7.4 (train.py), MAE 12.5, CleanRL's
ppo.py 9.6.
"""
import ast
import io
import sys
import tokenize
from collections import Counter

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def tokens_by_line(source, skipped):
    """{number of a line: how many tokens it has} of the lines of code."""
    tokens = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type not in LAYOUT and line not in skipped:
            tokens[line] += 1
    return tokens


def is_packed(node):
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return isinstance(node.targets[0], ast.Tuple)


def nested_in(node):
    """How many comprehensions and conditional expressions are inside a comprehension."""
    if not isinstance(node, COMPREHENSIONS):
        return 0
    inner = [part for part in ast.walk(node) if part is not node]
    return sum(isinstance(part, (*COMPREHENSIONS, ast.IfExp)) for part in inner)


def measure(source, first=1, last=10 ** 9):
    """The figures of the lines from `first` to `last` of a module's source."""
    tree = ast.parse(source)
    text = source.splitlines()
    tokens = tokens_by_line(source, docstring_lines(tree))
    tokens = {line: count for line, count in tokens.items() if first <= line <= last}
    nodes = [node for node in ast.walk(tree) if first <= getattr(node, "lineno", 0) <= last]
    lines = max(len(tokens), 1)
    counts = sorted(tokens.values()) or [0]
    per_hundred = 100 / lines
    return {
        "code lines": lines,
        "tokens": sum(counts) / lines,
        "densest tenth": counts[int(lines * 0.9)],
        "over 30 tokens": sum(count > 30 for count in counts) * per_hundred,
        "wide %": sum(len(text[line - 1]) > 100 for line in tokens) * per_hundred,
        "packed": sum(map(is_packed, nodes)) * per_hundred,
        "nested": sum(map(nested_in, nodes)) * per_hundred,
    }


def parts(source):
    """{part: (first line, last line)}: the lesson and the appendix, the whole without a banner."""
    lines = source.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("# === Appendix"):
            return {"lesson": (1, number - 1), "appendix": (number, len(lines))}
    return {"whole": (1, len(lines))}


if __name__ == "__main__":
    for file in sys.argv[1:]:
        with open(file, encoding="utf-8") as stream:
            source = stream.read()
        for part, (first, last) in parts(source).items():
            row = measure(source, first, last)
            figures = [f"{name} {value:6.1f}" for name, value in row.items()]
            print(f"{file:30} {part:9} {'  '.join(figures)}")
