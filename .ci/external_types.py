"""Checks that the public interface names no type or trait of another crate than those of ALLOWED, from the file
of rustdoc's JSON that is given. `.ci/public-api` makes it.

A crate that is named there belongs to our own promise: its next major version is ours too."""

import json
import sys

# `http_body_util::Full` is the body of the answers and of the admin service. `pin_project_lite` names a private type of its own
# in the `Unpin` that its macro writes.
ALLOWED = {"std", "core", "alloc", "bytes", "http", "http_body", "http_body_util", "pin_project_lite", "serde_core", "tonic", "tower",
           "tower_http", "tower_layer", "tower_service"}

with open(sys.argv[1]) as file:
    data = json.load(file)
paths, crates = data["paths"], data["external_crates"]


def named(node):
    """The ids of all types and traits that are named within."""
    if isinstance(node, dict):
        if {"id", "path", "args"} <= node.keys():
            yield str(node["id"])
        node = node.values()
    if isinstance(node, (list, type({}.values()))):
        for part in node:
            yield from named(part)


found = {}
for item in data["index"].values():
    implementation = item["inner"].get("impl", {})
    # Blanket implementations of other crates (`impl<T> Instrument for T`) are no doing of ours.
    if item["crate_id"] != 0 or implementation.get("blanket_impl") or implementation.get("is_synthetic"):
        continue
    for summary in filter(None, map(paths.get, named(item["inner"]))):
        if summary["crate_id"] != 0:
            found.setdefault(crates[str(summary["crate_id"])]["name"], set()).add("::".join(summary["path"]))
for crate in sorted(found):
    print(f"{crate}: {', '.join(sorted(found[crate])) if crate not in {'std', 'core', 'alloc'} else len(found[crate])}")
if strangers := sorted(found.keys() - ALLOWED):
    sys.exit(f"in the public interface, but not allowed there: {', '.join(strangers)}")
