"""Every mistake in the text is pointed at, and no text, however hostile, does anything but parse or be refused."""

import random
import time
from itertools import count

import pytest
from plait.ir import OPS, Builder, ParseError, PlacementError, dump, parse, parse_statements, parse_type
from plait.ir.grow import random_graph
from plait.ir.init import RECIPES

MISTAKES = [  # (an equation in place of `y = silu(x)`, what the error says)
    ("y = sillu(x)", "no op or graph called sillu"),
    ("y = rms_norm(x, epsilon=1e-6)", "rms_norm has no attribute epsilon"), ("y = rms_norm(x, esp=1e-6)", "did you mean eps?"),
    ("y = rms_norm(x, eps='a')", "must be a float"), ("y = rms_norm(x, eps=True)", "must be a float"),
    ("y = rms_norm(x, eps=1e999)", "must be finite"),
    ("y = scale(x)", "attribute by is missing"), (f"y = scale(x, by=1{'0' * 400})", "must be under"),
    ("y = gelu(x, approximate='fast')", "must be one of none, tanh"),
    ("y = split(x, sizes=('a', 'b'))", r"must be a tuple\[int"),
    ("y = linear(x)", "operand w is missing"), ("y = linear(x, x, x, x)", "takes 3 operands, got 4"),
    ("y = linear(x, x, w=x)", "given twice"),
    ("y = silu(x=x, weight=x)", "no operand weight"), ("y, z = silu(x)", "gives 1 results, 2 names"),
    ("y, = split(x, sizes=(1, 2))", "gives 2 results, 1 names"),
    ("y = silu(q)", "q is not defined above"), ("x = silu(x)", "x is defined twice"),
    ("y, y = split(x, sizes=(1, 2))", "y is defined twice"),
    ("y = silu(silu(x))", "expected a name"), ("y = silu(**x)", r"`\*\*` is not allowed"), ("y = silu(*x)", "expected a name"),
    ("y = rms_norm(x, eps=f'{x}')", "an attribute is a number"), ("y = rms_norm(x, eps=-'a')", "only a number"),
    ("y = lambda: x", "expected `y = op"),
    ("y = rms_norm(x, eps=lambda: 1)", "an attribute is a number"), ("import os", "expected `y = op"),
    ("y = os.system(x)", "expected `y = op"),
    ("y = z = silu(x)", "one left side"), ("y: f32[3] = silu(x)", "expected `y = op"), ("y += silu(x)", "expected `y = op"),
    ("y = rms_norm(x, eps=1, eps=2)", "eps is given twice"), ("if x: pass", "expected `y = op"),
    ("é = silu(x)", "must be a plain identifier"),
    ("y[0] = silu(x)", "expected a name"), ("y = silu(tokens)", "its dtype must be a float"),
    ("y = add(x, tokens)", "its dtype must be a float"),
    ("y = embedding(x, x)", "its dtype must be i64"), ("y = silu(x, [x])", "expected a name"),
    ("y = all_gather(x, axis='cp', dim=7)", "must be under 2"),
    ("y = reshape(x, pattern='a b')", "two sides"), ("y = reshape(x, pattern='a a -> a a')", "each letter once"),
    ("y = reshape(x, pattern='a b -> a c')", "same letters"),
    ("y = reshape(x, pattern='a=q b -> b a=q')", "a size is a number"),
    ("y = f(x)", "calls itself"), ("inf = silu(x)", "must be a plain identifier"),
]  # fmt: skip
TYPES = [
    ("f33[2]", "no dtype called f33"), ("f32", "expected a type"), ("f32[2]+", "invalid syntax"), ("f32[2.5]", "not a dim"),
    ("f32[-2]", "not a dim"),
    ("f32[3-5]", "at least 0"), ("f32[(n+1)*2]", "cannot multiply the sum"), ("f32[True]", "not a dim"),
    ("f32[2@3]", "not a dim"), ("f32[2@cp@cp]", "cp twice"),
    ("f32[2@cp]+cp", "cp twice"), ("f32[2]+cp+cp", "partial over cp twice"), ("f32[2:sorted]", "an order is"),
    ("f32[2:zigzag(0)]", "an order is"),
    ("f32[2:zigzag('a')]", "an order is"), (f"f32[{2**62}]", "not a dim"), (f"f32[{2**61}*{2**61}]", "under 2"),
    ("f32[é]", "plain identifier"),
    ("f32[2@é]", "plain identifier"), ("f32[2]+é", "plain identifier"), ("f32[2:3:4]", "not a dim"), ("f32[[2]]", "not a dim"),
    ("'f32[2]'", "expected a type"),
    (f"f32[{'9' * 5000}]", "Exceeds the limit"), (f"f32[{'*'.join('b' * 200)}]", "nested too deeply"),
]  # fmt: skip
WHOLE = [
    ("", "there is no graph here"), ("x = silu(y)", "a graph starts with"), ("async def f(): return x", "a graph starts with"),
    ("def f(x: f32[2]):\n    y = silu(x)\n", "ends with `return`"), ("def f(x: f32[2]):\n    return\n", "ends with `return`"),
    ("def f(x):\n    return x\n", "x needs a type"), ("def f(x: f32[2], x: f32[2]):\n    return x\n", "x is defined twice"),
    ("def f(x: f32[2] = 1):\n    return x\n", "an input is"), ("def f(*x):\n    return x\n", "an input is"),
    ("def f(x: f32[2], /):\n    return x\n", "an input is"),
    ("def f(*, w: f32[2] = 3):\n    return w\n", "init recipe"),
    ("def f(*, w: f32[2] = best(3)):\n    return w\n", "no init recipe called best"),
    ("def f(*, w: f32[2] = normal()):\n    return w\n", "takes 1 numbers"),
    ("def f(*, w: f32[2] = normal('a')):\n    return w\n", "takes numbers"),
    (f"def f(*, w: f32[2] = normal(1{'0' * 400})):\n    return w\n", "do not fit"),
    ("@jit\ndef f(x: f32[2]):\n    return x\n", "marked @layer or @kernel"),
    ("@layer\n@kernel\ndef f(x: f32[2]):\n    return x\n", "marked @layer or @kernel"),
    ("@layer(1)\ndef f(x: f32[2]):\n    return x\n", "marked @layer or @kernel"),
    ("def f(x: f32[2]):\n    y = g(x)\n    return y\ndef g(x: f32[2]):\n    y = f(x)\n    return y\n", "calls itself"),
    ("def f(x: f32[2]):\n    y = g(x)\n    return y\ndef g(x: f32[3]):\n    return x\n", r"x is f32\[2\], must be f32\[3\]"),
    ("def f(x: f32[2]):\n    y = g(x, x)\n    return y\ndef g(x: f32[2]):\n    return x\n", "takes 1 operands, got 2"),
    ("def f(x: f32[2]):\n    y = g(x)\n    return y\n@layer\ndef g(x: f32[2]):\n    return x\n", "params='prefix'"),
    ("def f(x: f32[2]):\n    y = g(x, eps=1)\n    return y\ndef g(x: f32[2]):\n    return x\n", "with operands alone"),
    ("def f(x: f32[2]):\n    return x\ndef f(x: f32[2]):\n    return x\n", "f is defined twice"),
    ("def f(x: f32[2]):\n    return silu(x)\n", "expected a name"),
    ("def f(x: f32[2]):\n  y = silu(x\n  return y\n", "was never closed"),
    ("def é(x: f32[2]):\n    return x\n", "plain identifier"),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "why"), MISTAKES, ids=lambda x: x[:40])
def test_a_mistake_in_an_equation_is_pointed_at(equation: str, why: str) -> None:
    with pytest.raises(ParseError, match=why) as raised:
        parse(f"def f(x: f32[3, 3], tokens: i64[3, 3]):\n    h = silu(x)\n    {equation}\n    return h\n", "m.ir")
    where, shown, caret = str(raised.value).split("\n")
    assert (
        where.startswith("m.ir, line 3: ") and equation[:20] in shown and caret.strip() == "^" and len(caret) <= len(shown) + 1
    )


@pytest.mark.parametrize(("text", "why"), TYPES, ids=lambda x: x[:40])
def test_a_mistake_in_a_type_is_pointed_at(text: str, why: str) -> None:
    with pytest.raises(ParseError, match=why) as raised:
        parse(f"def f(a: f32[1],\n      x: {text}):\n    return x\n")
    assert "line 2: " in str(raised.value) or "Exceeds" in why
    with pytest.raises((ParseError, PlacementError), match=why.replace("cp twice", "cp")):
        Builder("f").input("x", parse_type(text))


@pytest.mark.parametrize(("text", "why"), WHOLE, ids=lambda x: x[:40])
def test_a_mistake_in_a_graph_is_pointed_at(text: str, why: str) -> None:
    with pytest.raises(ParseError, match=why) as raised:
        parse(text)
    assert ", line " in str(raised.value) and (not text or str(raised.value).endswith("^"))


def test_the_caret_stands_under_the_place() -> None:
    with pytest.raises(ParseError) as raised:
        parse("def f(x: f32[3]):\n    y = rms_norm(x, eps=('é', 1 + 1))\n    return y\n")
    assert str(raised.value).split("\n")[1:] == ["      y = rms_norm(x, eps=('é', 1 + 1))", "                                ^"]


HOSTILE = [
    "(" * 10**5, "-" * 10**5 + "1", "[" * 10**5 + "]" * 10**5, "f(" * 10**5, "x" + "[0]" * 10**5, "not " * 10**5 + "x",
    "lambda: " * 10**5 + "x",
    "*".join("b" * 10**5), "\n".join(" " * i + "if x:" for i in range(200)), "a\0b", "\0", "\ufeffdef", "\ud800",
    "\x0c\x1c\u2028", "9" * 10**5, "x = " * 10**4 + "y",
    "elif".join(["if x: y\n"] * 10**3), "0x" + "f" * 10**5, "'" + "\\d" * 100 + "'",
    "def f(" + ", ".join(f"a{i}: f32[2]" for i in range(300)) + "):",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda x: ascii(x[:12]))
def test_hostile_text_is_refused_at_once(text: str) -> None:
    for shape in (
        "{}",
        "def f(x: {}):\n    return x",
        "def f(x: f32[2]):\n    y = {}\n    return x",
        "def f(x: f32[2]):\n    y = scale(x, by={})\n    return x",
    ):
        start = time.process_time()
        for read in (parse, parse_type, parse_statements):
            try:
                read(shape.format(text))
            except ParseError:
                continue
            assert read is not parse or "\x0c" in text
        assert time.process_time() - start < 5


def test_a_long_chain_of_calls_is_refused_and_a_long_graph_is_not() -> None:
    chain = "\n".join(f"def g{i}(x: f32[2]):\n    y = g{i + 1}(x)\n    return y" for i in range(500))
    with pytest.raises(ParseError, match="32 deep"):
        parse(chain)
    start, lines = time.process_time(), "\n".join(f"    y{i + 1} = silu(y{i})  # from layers.{i}" for i in range(3000))
    assert len(parse(f"def f(y0: f32[2]):\n{lines}\n    return y3000\n").nodes) == 3000
    assert time.process_time() - start < 5


def survives(text: str) -> bool:
    """Whether the text parses; if it does, it round-trips, and nothing but a ParseError may come out."""
    try:
        graph = parse(text)
    except ParseError as error:
        assert ", line " in str(error)
        return False
    assert parse(dump(graph)) == graph
    return True


def test_a_file_cut_anywhere_is_refused_or_whole() -> None:
    text = next(t for t in (dump(random_graph(seed)) for seed in count()) if len(t) > 1000)
    assert sum(survives(text[:n]) for n in range(len(text))) < 10 and survives(text)


WORDS = [
    "0", "-1", "1e999", "None", "True", "'", '"', "(", ")", "[", "]", ",", ":", "@cp", "@tp", "+cp", ":zigzag(2)", "**", "*",
    "=", "==", "\n", "    ", "#", " from a.b",
    "s", "n+1", "b*s", "inf", "nan", "x", "w", "f32", "i64", "bool", "bf16", "split", "linear", "sizes=(1, 3)", "dim=9",
    "axis=3", "@layer", "@kernel", "return ", "def f(", "\0",
    "é", "99999999999999999999", "lambda: 0", "pattern='... (h d=2) -> h ... d'", "4@cp", "(4+n)@cp", *OPS,
    *(f"{r}(1.0)" for r in RECIPES),
]  # fmt: skip


def mutated(text: str, data: random.Random) -> str:
    """Text with a few parts cut, doubled, moved, swapped or replaced by words of the language."""
    for _ in range(data.randrange(1, 4)):
        i, n = data.randrange(len(text)), data.choice([0, 1, 1, 2, 5, 20])
        new = data.choice([data.choice(WORDS), text[i : i + n] * 2, "", text[(j := data.randrange(len(text))) : j + n]])
        text = text[:i] + new + text[i + n :] or " "
    return text


def test_mutated_text_is_refused_or_round_trips() -> None:
    data = random.Random(0)
    sources = [dump(random_graph(seed)) for seed in range(40)]
    accepted = sum(survives(mutated(data.choice(sources), data)) for _ in range(2000))
    assert 50 < accepted < 1800
