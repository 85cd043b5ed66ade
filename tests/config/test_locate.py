"""Lines of keys: a document whose lines are known by eye, and random ones that know their own."""

import random
import tomllib

import pytest

from kinema.config.locate import KeyPath, key_lines

DOCUMENT = '''# comment with [brackets] and "quotes"
title = "a # no comment"

[model] # a comment
text = """
[not.a.table]
key = "in text" \\""" still
five = """""
after = 'C:\\path\\'
"quoted.key" . inner = 1
raw = \'\'\'
x = "
\'\'\'\'\'

[data.buckets]
frames = [
    1, # one
    # nothing here
    [2,
     3], { a = "}", b.c = [
        4 ] },
]

[[data.sources]]
path = "x"
[[data.sources]]
path = "y"
  [data.sources.inner]
  when = 1979-05-27 07:32:00
  [[data.sources.deep]]
  k = { }
[data]
last = -inf
'''


def paths(value: object, path: KeyPath = ()) -> set[KeyPath]:
    """Every path of parsed TOML."""
    found = {path} if path else set()
    if isinstance(value, dict):
        return found.union(*(paths(one, (*path, key)) for key, one in value.items()))
    if isinstance(value, list):
        return found.union(*(paths(one, (*path, index)) for index, one in enumerate(value)))
    return found


def test_lines_of_a_document_with_everything() -> None:
    assert key_lines(DOCUMENT) == {
        ("title",): 2,
        ("model",): 4,
        ("model", "text"): 5,
        ("model", "after"): 9,
        ("model", "quoted.key"): 10,
        ("model", "quoted.key", "inner"): 10,
        ("model", "raw"): 11,
        ("data",): 32,
        ("data", "buckets"): 15,
        ("data", "buckets", "frames"): 16,
        ("data", "buckets", "frames", 0): 17,
        ("data", "buckets", "frames", 1): 19,
        ("data", "buckets", "frames", 1, 0): 19,
        ("data", "buckets", "frames", 1, 1): 20,
        ("data", "buckets", "frames", 2): 20,
        ("data", "buckets", "frames", 2, "a"): 20,
        ("data", "buckets", "frames", 2, "b"): 20,
        ("data", "buckets", "frames", 2, "b", "c"): 20,
        ("data", "buckets", "frames", 2, "b", "c", 0): 21,
        ("data", "sources"): 24,
        ("data", "sources", 0): 24,
        ("data", "sources", 0, "path"): 25,
        ("data", "sources", 1): 26,
        ("data", "sources", 1, "path"): 27,
        ("data", "sources", 1, "inner"): 28,
        ("data", "sources", 1, "inner", "when"): 29,
        ("data", "sources", 1, "deep"): 30,
        ("data", "sources", 1, "deep", 0): 30,
        ("data", "sources", 1, "deep", 0, "k"): 31,
        ("data", "last"): 33,
    }


def test_the_paths_are_tomllibs_and_windows_line_ends_change_nothing() -> None:
    lines = key_lines(DOCUMENT)
    assert set(lines) == paths(tomllib.loads(DOCUMENT))
    assert key_lines(DOCUMENT.replace("\n", "\r\n")) == lines
    assert key_lines("") == {}
    assert key_lines("a = 1") == {("a",): 1}


class _Writer:
    """Writes random TOML and remembers the line of every key that it writes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def put(self, text: str) -> None:
        self.text += text

    def mark(self, path: KeyPath) -> None:
        self.lines[path] = self.text.count("\n") + 1

    def gap(self) -> None:
        self.put(self.random.choice(["", " ", "\n", " # ] } \" ' = [\n", "\n\n  "]))

    def key(self, name: str) -> None:
        self.put(self.random.choice([name, f'"{name}"', f"'{name}'"]))

    def value(self, path: KeyPath, depth: int) -> None:
        kind = self.random.randrange(8 if depth else 6)
        texts = ['"a # \\" ] , }"', "'[{ \"'", '"""\n[x]\ny = 1 \\" \n"" """""', "'''\n'' [[z]]\n#'''"]
        if kind < 4:
            self.put(texts[kind])
        elif kind < 6:
            self.put(self.random.choice(["1", "-2.5e3", "true", "1979-05-27T07:32:00Z", "07:32:00", "nan"]))
        elif kind == 6:
            self.put("[")
            for index in range(self.random.randrange(4)):
                self.gap()
                self.mark((*path, index))
                self.value((*path, index), depth - 1)
                self.gap()
                self.put(",")
            self.gap()
            self.put("]")
        else:
            self.put("{ ")
            for index in range(self.random.randrange(3)):
                self.put(", " if index else "")
                self.mark((*path, f"k{index}"))
                self.key(f"k{index}")
                self.put(" = ")
                self.value((*path, f"k{index}"), 0)
            self.put(" }")

    def pairs(self, table: KeyPath) -> None:
        for index in range(self.random.randrange(4)):
            self.mark((*table, f"p{index}"))
            self.key(f"p{index}")
            self.put(self.random.choice(["=", " = ", "\t=  "]))
            self.value((*table, f"p{index}"), 2)
            self.put(self.random.choice(["\n", "  # note ]\n", "\n\n"]))

    def document(self) -> None:
        self.pairs(())
        for index in range(3):
            self.mark((f"t{index}",))
            self.put(f"[ t{index} ]\n")
            self.pairs((f"t{index}",))
        for index in range(3):
            self.mark(("list", index))
            self.lines.setdefault(("list",), self.text.count("\n") + 1)
            self.put("[[list]]\n")
            self.pairs(("list", index))
            self.mark(("list", index, "sub"))
            self.put("[list.'sub']#\n")
            self.pairs(("list", index, "sub"))


@pytest.mark.parametrize("seed", range(40))
def test_random_documents(seed: int) -> None:
    writer = _Writer(seed)
    writer.document()
    tomllib.loads(writer.text)  # it is TOML
    assert key_lines(writer.text) == writer.lines
