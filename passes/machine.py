"""Machine descriptions: what a mesh's devices and links can do, as TOML that a measurement can rewrite."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..ir import Mesh, PlaitError

MAX_BYTES = 2**16
DTYPES = ("bf16", "f16", "f32", "f64")


class Field(NamedTuple):
    """A number of a description: what it must be, and its bounds."""

    what: str
    low: float
    high: float


def _share(what: str) -> Field:
    return Field(f"the share of the peak that {what} reaches, over 0 and at most 1", 1e-6, 1)


_RATE, _LATENCY = "over 0 and under 1e30", "seconds, from 0 to 10"
FIELDS: Mapping[str, Field] = {
    "devices": Field("a whole number of devices in a node, at least 1", 1, 2**20),
    **{f"flops.{dtype}": Field(f"peak operations a second, {_RATE}", 1e-30, 1e30) for dtype in DTYPES},
    "memory.bandwidth": Field(f"bytes a second that a device's memory moves, {_RATE}", 1e-30, 1e30),
    **{
        f"links.{link}.{name}": field
        for link in ("node", "network")
        for name, field in (
            ("latency", Field(_LATENCY, 0, 10)),
            ("bandwidth", Field(f"bytes a second that a device sends, {_RATE}", 1e-30, 1e30)),
        )
    },
    **{f"efficiency.{name}": _share(name) for name in ("attention", "recurrence", "memory", "link")},
}
TEXTS = ("name", "about")


@dataclass(frozen=True)
class Link:
    """What connects the ranks of a mesh axis."""

    name: str
    latency: float  # seconds before the first byte of a message
    bandwidth: float  # bytes a second that one device sends, as sold


@dataclass(frozen=True)
class Machine:
    """Devices in nodes, nodes in a network; peaks, and the shares of them that are reached."""

    name: str
    about: str
    numbers: Mapping[str, float]  # by the names in FIELDS

    @property
    def devices(self) -> int:
        """Devices in a node."""
        return int(self.numbers["devices"])

    def link(self, mesh: Mesh, axis: str) -> Link:
        """The link of an axis: inside a node where every group of its ranks fits there, the network otherwise.

        Ranks count through the last axis fastest, and fill nodes in order.
        """
        names = [name for name, _ in mesh.axes]
        inner = math.prod(size for name, size in mesh.axes if names.index(name) > names.index(axis))
        kind = "node" if self.devices % (inner * mesh[axis]) == 0 else "network"
        return Link(kind, self.numbers[f"links.{kind}.latency"], self.numbers[f"links.{kind}.bandwidth"])

    def sending(self, link: Link, size: float, messages: int) -> float:
        """Seconds until messages of `size` bytes together, one after the other, are there."""
        return messages * link.latency + size / (link.bandwidth * self.numbers["efficiency.link"])

    def copying(self, size: float) -> float:
        """Seconds that `size` bytes take through memory, reads and writes together."""
        return size / (self.numbers["memory.bandwidth"] * self.numbers["efficiency.memory"])

    def computing(self, flops: float, dtype: str, kind: str) -> float:
        """Seconds of attention or of a recurrence."""
        return flops / (self.numbers[f"flops.{dtype}"] * self.numbers[f"efficiency.{kind}"])


def machine_names() -> tuple[str, ...]:
    """The descriptions that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def _folder() -> Path:
    return Path(__file__).with_name("machines")


def load_machine(source: str | Path) -> Machine:
    """The machine of a name that comes with the package, or of a .toml file."""
    text = str(source)
    if text in machine_names():
        return parse_machine(_read(_folder() / f"{text}.toml"), f"{text}.toml")
    if Path(text).suffix.lower() != ".toml":
        near = difflib.get_close_matches(text, machine_names(), 1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(machine_names())}"
        raise PlaitError(f"machine: {text[:60]!r} is no machine's name and no .toml file; {known}")
    return parse_machine(_read(Path(text)), Path(text).name)


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise PlaitError(f"machine: {path} is a directory or a device; must be a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        rest = f"give a file that does, or one of {', '.join(machine_names())}"
        raise PlaitError(f"machine: {path} does not exist; {rest}") from None
    except UnicodeDecodeError as error:
        raise PlaitError(f"machine: {path} is not UTF-8 text (byte {error.start}); must be TOML") from None
    except (OSError, ValueError) as error:
        raise PlaitError(f"machine: {str(path)!r} cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise PlaitError(f"machine: {path} is larger than {MAX_BYTES} bytes; a description is a page of text")
    return text


def parse_machine(text: str, where: str = "machine") -> Machine:
    """A machine from TOML; every field is named that is missing, unknown, or cannot be."""
    try:
        found = _flat(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PlaitError(f"{where}: does not parse: {str(error)[:200]}") from None
    known = [*TEXTS, *FIELDS]
    if unknown := next((name for name in found if name not in known), None):
        near = difflib.get_close_matches(unknown, known, 1)
        what = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise PlaitError(f"{where}: {unknown[:80]} is no field of a machine; {what}")
    if missing := next((name for name in known if name not in found), None):
        must = FIELDS[missing].what if missing in FIELDS else "a line of text"
        raise PlaitError(f"{where}: {missing} is missing; must be {must}")
    name, about = (_text(where, name, found[name]) for name in TEXTS)
    return Machine(name, about, {name: _number(where, name, found[name]) for name in FIELDS})


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"links": {"node": {"latency": x}}}` as `{"links.node.latency": x}`."""
    made = dict[str, Any]()
    for name, value in table.items():
        inner = cast("Mapping[str, Any]", value)
        made |= _flat(inner, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return made


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 200:
        raise PlaitError(f"{where}: {name} is {str(value)[:60]!r}; must be a line of text")
    return value


def _number(where: str, name: str, value: Any) -> float:
    field = FIELDS[name]
    good = isinstance(value, int | float) and not isinstance(value, bool) and field.low <= value <= field.high
    if not good or (name == "devices" and value != int(value)):
        raise PlaitError(f"{where}: {name} is {str(value)[:60]}; must be {field.what}")
    return value


def dump_machine(machine: Machine) -> str:
    """A machine as TOML that reads back to an equal one."""
    quoted = [f'{name} = "{_escaped(getattr(machine, name))}"' for name in TEXTS]
    tables = dict[str, list[str]]()
    for name, value in machine.numbers.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, []).append(f"{key} = {value!r}")
    plain = tables.pop("", [])
    return "\n\n".join(["\n".join([*quoted, *plain]), *(f"[{t}]\n" + "\n".join(rows) for t, rows in tables.items())]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
