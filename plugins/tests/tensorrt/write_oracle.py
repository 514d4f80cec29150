"""Write recorded runs of the official package as one binary file that the C++ tests read (oracle.h).

    write_oracle.py OUTPUT CASE...

A CASE is a folder with case.json and trace.npz (tests/golden). The standard library suffices.
"""

import ast
import json
import struct
import sys
import zipfile
from pathlib import Path


def read_array(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], list[int] | list[float]]:
    """Shape and values, in C order, of one array of an .npz file. Only the types that traces have."""
    data = archive.read(f"{name}.npy")
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise SystemExit(f"error: {archive.filename}: {name} is not an array of format 1.0")
    (length,) = struct.unpack_from("<H", data, 8)
    header = ast.literal_eval(data[10 : 10 + length].decode())
    code = {"<f4": "f", "<i4": "i", "<i8": "q"}.get(header["descr"])
    if code is None or header["fortran_order"]:
        raise SystemExit(f"error: {archive.filename}: {name} has type {header['descr']}, or Fortran's order")
    values = [value for (value,) in struct.iter_unpack(f"<{code}", data[10 + length :])]
    return header["shape"], values


def case_bytes(folder: Path) -> bytes:
    """One case: see ReadOracle in oracle.h."""
    arguments = json.loads((folder / "case.json").read_text())
    with zipfile.ZipFile(folder / "trace.npz") as archive:
        (layers, heads, tokens), log_beta = read_array(archive, "log_beta")
        _, lengths = read_array(archive, "chunks")
        flat = [read_array(archive, f"step_{i}_kept")[1] for i in range(len(lengths))]
    kept = [sorted(tuple(values[i : i + 3]) for i in range(0, len(values), 3)) for values in flat]
    name = folder.name.encode()
    numbers = [
        layers,
        heads,
        arguments["budget"],
        max(1, arguments["buffer"]),
        0 if arguments["gate"] == "rg10" else 1,
        arguments["min_per_head"],
        arguments["lookahead"],
        tokens,
        len(lengths),
        *lengths,
    ]
    out = [struct.pack("<i", len(name)), name, struct.pack(f"<{len(numbers)}i", *numbers)]
    out.append(struct.pack(f"<{len(log_beta)}f", *log_beta))
    for entries in kept:
        out.append(struct.pack("<i", len(entries)))
        out += [struct.pack("<3i", *entry) for entry in entries]
    return b"".join(out)


def main() -> None:
    """Command line: see above."""
    output, *folders = sys.argv[1:]
    cases = [case_bytes(Path(folder)) for folder in folders]
    Path(output).write_bytes(struct.pack("<i", len(cases)) + b"".join(cases))


if __name__ == "__main__":
    main()
