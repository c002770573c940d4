"""Checks what the lock file brings in, from `cargo metadata --all-features` on the standard input: licences, sources, duplicates
and the Rust version that each dependency asks for. Reads only; needs no network.

All but the last is what cargo-deny checks too, by the same lists; to compile that takes longer than everything here."""

import json
import re
import sys
import tomllib

with open(".cargo/deny.toml", "rb") as file:
    deny = tomllib.load(file)
LICENCES = set(deny["licenses"]["allow"])
TWICE = {skipped["crate"].split("@")[0] for skipped in deny["bans"]["skip"]}
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


def allowed(expression):
    """Whether an SPDX expression can be met with LICENCES. Old manifests write `A/B` for `A OR B`."""
    words = re.findall(r"[()]|[\w.+-]+(?: WITH [\w.+-]+)?", (expression or "none").replace("/", " OR "))
    meaning = {"OR": "or", "AND": "and", "(": "(", ")": ")"}
    # Only operators, brackets, True and False are left.
    return eval(" ".join(meaning.get(word, str(word in LICENCES)) for word in words))


def version(text):
    return tuple(int(part) for part in text.split("."))


data = json.load(sys.stdin)
packages = {package["id"]: package for package in data["packages"]}
edges = {node["id"]: node["deps"] for node in data["resolve"]["nodes"]}
root = data["resolve"]["root"]
ours = packages[root]["rust_version"] or sys.exit("Cargo.toml states no rust-version")

# What users compile: everything that is reached without a dev-dependency.
seen, todo = set(), [root]
while todo:
    package = todo.pop()
    if package not in seen:
        seen.add(package)
        todo += [edge["pkg"] for edge in edges[package] if any(kind["kind"] != "dev" for kind in edge["dep_kinds"])]
used = [packages[package] for package in seen]
names = [package["name"] for package in used]

faults = ["{name} {version}: licence {license}".format(**p) for p in data["packages"] if not allowed(p["license"])]
faults += ["{name} {version}: from {source}".format(**p) for p in data["packages"] if p["id"] != root and p["source"] != REGISTRY]
faults += [f"{name}: compiled in {names.count(name)} versions" for name in set(names) - TWICE if names.count(name) > 1]
faults += [
    "{name} {version}: needs Rust {rust_version}".format(**p) for p in used if version(p["rust_version"] or "1") > version(ours)
]
if faults:
    sys.exit("\n".join(sorted(faults)))
print(f"{len(data['packages'])} packages, {len(used)} of them compiled by users, none newer than Rust {ours}")
