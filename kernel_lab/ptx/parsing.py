"""PTX text to a :class:`~kernel_lab.ptx.instructions.Program`: what LLVM and Triton emit, one kernel without calls."""

import re
from pathlib import Path

from kernel_lab.ptx.control_flow import lay_out
from kernel_lab.ptx.instructions import (
    STACK,
    Address,
    Immediate,
    Instruction,
    Label,
    Operand,
    Program,
    Register,
    Special,
    Vector,
)

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u16": 16, "u32": 32, "u64": 64}
NOT_OURS = ("triton/language/", "triton/experimental/")  # lines there are told by the line of ours that called them


def parse(text: str) -> Program:
    """The kernel in a PTX text, its blocks in an order in which branches meet again.

    Raises:
        ValueError: there is none, or something of it is unknown.
    """
    header = re.search(r"\.visible \.entry (\w+)\(([^)]*)\)(.*?)\n\{", text, re.DOTALL)
    if header is None:
        raise ValueError("no kernel in the PTX: nothing in it looks like '.visible .entry name(...)'")
    files = {int(number): name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE)}
    reader = _Reader(files)
    for line in text[header.end() : text.index("\n}", header.end())].splitlines():
        reader.read_line(line)
    parameters = [(name, kind) for kind, name in re.findall(r"\.param \.(\w+)[^\n]*?(\w+_param_\d+)", header.group(2))]
    return lay_out(
        Program(header.group(1), reader.instructions, reader.labels, reader.widths, parameters, reader.stack_bytes)
    )


class _Reader:
    def __init__(self, files: dict[int, str]) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: list[int] = []
        self.stack_bytes = 0
        self._files = files
        self._registers: dict[str, Register] = {}
        self._width_of_prefix: dict[str, int] = {}  # "%rd" -> 64
        self._where = "?"
        self._in_assembly = False
        self._begun = ""  # a statement that goes on in the next line

    def read_line(self, line: str) -> None:
        if "begin inline asm" in line:
            self._in_assembly = True
        elif "end inline asm" in line:
            self._in_assembly = False
        line = line.split("//")[0].strip()
        if not line:
            return
        if re.match(r"\.loc\s", line):
            if not self._in_assembly:  # LLVM counts the lines of an assembly text as lines of the source
                self._read_location(line)
            return
        if label := re.match(r"(\$?\w+):$", line):
            self.labels[label.group(1)] = len(self.instructions)
            return
        *statements, self._begun = f"{self._begun} {line}".split(";")
        for statement in statements:
            self._read_statement(statement.strip().lstrip("{} \t"))

    def _read_location(self, line: str) -> None:
        for number, row in re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", line):
            name = self._files.get(int(number), "?")
            if not any(part in name for part in NOT_OURS):
                self._where = f"{Path(name).name}:{row}"
                return

    def _read_statement(self, statement: str) -> None:
        if not statement or statement.startswith(".pragma"):
            return
        if registers := re.match(r"\.reg\s+\.(\w+)\s+(.+)", statement):
            self._declare(WIDTHS[registers.group(1)], registers.group(2))
        elif stack := re.match(r"\.local .*__local_depot\d+\[(\d+)\]", statement):
            self.stack_bytes = int(stack.group(1))
        elif statement.startswith("."):
            raise ValueError(f"unknown directive in the PTX: {statement}")
        else:
            self._read_instruction(statement)

    def _declare(self, width: int, names: str) -> None:
        for name in names.split(","):
            prefix, many, _ = name.strip().partition("<")
            if many:
                self._width_of_prefix[prefix] = width
            else:
                self._registers[prefix] = self._new_register(width)

    def _read_instruction(self, statement: str) -> None:
        match = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
        if match is None:
            raise ValueError(f"no instruction: {statement}")
        negated, guard, opcode, operands = match.groups()
        self.instructions.append(
            Instruction(
                opcode,
                tuple(self._operand(part) for part in _split(operands)),
                self._register(guard) if guard else None,
                negated == "!",
                self._where,
                " ".join(statement.split()),
            )
        )

    def _new_register(self, width: int) -> Register:
        self.widths.append(width)
        return Register(len(self.widths) - 1, width)

    def _register(self, name: str) -> Register:
        if name not in self._registers:
            prefix = name.rstrip("0123456789")
            if prefix not in self._width_of_prefix:
                raise ValueError(f"a register that was not declared: {name}")
            self._registers[name] = self._new_register(self._width_of_prefix[prefix])
        return self._registers[name]

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._vector_part(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].replace(" ", ""))
        if text == "_":
            return None
        if re.match(r"%(tid|ctaid|ntid|nctaid)\.[xyz]$|%(laneid|warpid)$", text):
            return Special(text[1:])
        if "|" in text:
            raise ValueError(f"two destinations in one: {text}")
        if text.startswith("%") or text in self._registers:
            return self._register(text)
        if text == "global_smem":
            return Immediate(0)  # shared memory begins at 0
        if text.startswith("__local_depot"):
            return Immediate(STACK)
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16))
        if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", text):
            return Immediate(int(text.rstrip("U"), 0))
        return Label(text)

    def _vector_part(self, text: str) -> Register | Immediate | None:
        operand = self._operand(text)
        if operand is not None and not isinstance(operand, Register | Immediate):
            raise ValueError(f"a vector of something other than registers and numbers: {text}")
        return operand

    def _address(self, text: str) -> Address:
        base, _, offset = text.partition("+")
        number = int(offset, 0) if offset else 0
        if base.startswith("%") or base in self._registers:
            return Address(self._register(base), number)
        return Address(None if base == "global_smem" else base, number)


def _split(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]
