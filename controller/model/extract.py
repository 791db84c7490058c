#!/usr/bin/env python3
"""Takes the operations that we serve, and their shapes, out of botocore's service models.

    python3 -m venv /tmp/model && /tmp/model/bin/pip install botocore
    /tmp/model/bin/python controller/model/extract.py

Reads `operations.txt` (a section for each service, an operation a line) and writes `ec2.json` and
`sts.json` beside it: the operations, every shape that they reach, nothing of the documentation's
text. `build.rs` makes the Rust types from these files; they are in the repository so that a build
needs neither Python nor the network.

botocore is Copyright Amazon.com, Inc. or its affiliates, Apache-2.0: LICENSE.botocore.txt and
NOTICE.botocore are copied from the same package.
"""

import gzip
import importlib.metadata
import json
import pathlib
import sys

import botocore

HERE = pathlib.Path(__file__).parent

# What the generator reads; everything else (documentation, deprecation, patterns) stays behind.
METADATA = ("apiVersion", "protocol", "serviceId", "xmlNamespace")
SHAPE = ("type", "enum", "required", "min", "max", "sensitive")
MEMBER = ("shape", "locationName", "queryName", "idempotencyToken")


def kept(source, names):
    return {name: source[name] for name in names if name in source}


def reached(model, roots):
    """Names of the shapes that `roots` lead to, themselves included."""
    seen, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        shape = model["shapes"][name]
        if shape["type"] == "structure":
            waiting += [member["shape"] for member in shape["members"].values()]
        elif shape["type"] == "list":
            waiting.append(shape["member"]["shape"])
        elif shape["type"] == "map":
            waiting += [shape["key"]["shape"], shape["value"]["shape"]]
    return seen


def slim(shape):
    out = kept(shape, SHAPE)
    if "members" in shape:
        out["members"] = {name: kept(member, MEMBER) for name, member in shape["members"].items()}
    for inner in ("member", "key", "value"):
        if inner in shape:
            out[inner] = kept(shape[inner], MEMBER)
    return out


def extract(service, version, names):
    path = pathlib.Path(botocore.__file__).parent / "data" / service / version / "service-2.json.gz"
    with gzip.open(path) as file:
        model = json.load(file)
    unknown = [name for name in names if name not in model["operations"]]
    if unknown:
        sys.exit(f"{service} has no operation {', '.join(unknown)}")

    operations, roots = {}, []
    for name in sorted(names):
        operation = model["operations"][name]
        operations[name] = {side: operation[side] for side in ("input", "output") if side in operation}
        for side in operations[name].values():
            side.pop("documentation", None)
            roots.append(side["shape"])
    shapes = {name: slim(model["shapes"][name]) for name in sorted(reached(model, roots))}
    return {
        "source": f"botocore {importlib.metadata.version('botocore')}, data/{service}/{version}/service-2.json, "
        "Apache-2.0; shortened by extract.py",
        "metadata": kept(model["metadata"], METADATA),
        "operations": operations,
        "shapes": shapes,
    }


def read_list():
    """`{(service, version): [operation, …]}` out of operations.txt."""
    sections, current = {}, None
    for line in (HERE / "operations.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("["):
            service, version = line.strip("[]").split()
            current = sections.setdefault((service, version), [])
        elif line:
            current.append(line)
    return sections


def main():
    for (service, version), names in read_list().items():
        text = json.dumps(extract(service, version, names), indent=1, sort_keys=False)
        (HERE / f"{service}.json").write_text(text + "\n")
        print(f"{service}: {len(names)} operations, {len(text)} bytes")
    package = importlib.metadata.distribution("botocore")
    for file in package.files:
        if file.name in ("LICENSE.txt", "NOTICE") and ".dist-info" in str(file):
            target = {"LICENSE.txt": "LICENSE.botocore.txt", "NOTICE": "NOTICE.botocore"}[file.name]
            (HERE / target).write_text(package.locate_file(file).read_text())


if __name__ == "__main__":
    main()
