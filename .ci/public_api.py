"""Compares the public interface, from the file of rustdoc's JSON that is given, with `.ci/public-api.txt`, which has a line for
each item; with `--write` behind the file writes it anew. So a change of what users build on is seen in a diff, and meant.

What `#[doc(hidden)]` hides is no promise and not listed. Of the auto traits the three are that a service is asked for."""

import difflib
import json
import pathlib
import re
import sys

# Of rustdoc's JSON, which changes with the compiler.
FORMAT = 57
KEPT = pathlib.Path(__file__).with_name("public-api.txt")
AUTO = {"Send", "Sync", "Unpin"}

with open(sys.argv[1]) as file:
    data = json.load(file)
if data["format_version"] != FORMAT:
    print(f"rustdoc's JSON is of format {data['format_version']}, and not {FORMAT}: the public interface is not compared")
    sys.exit()
index, paths, crates = data["index"], data["paths"], data["external_crates"]


def item(number):
    return index.get(str(number))


def only(node):
    """The kind and the content of a node that is `{kind: content}` or, without content, `kind`."""
    return (node, {}) if isinstance(node, str) else next(iter(node.items()))


def path(node):
    """A name is told by its crate, unless it is std's or ours: the module it is in may be private, or change without a trace."""
    name = node["path"].rsplit("::", 1)[-1]
    crate = paths.get(str(node["id"]), {"crate_id": 0})["crate_id"]
    crate = crates[str(crate)]["name"] if crate else "std"
    return ("" if crate in {"std", "core", "alloc"} else crate + "::") + name + args(node["args"])


def args(node):
    if not node:
        return ""
    kind, inner = only(node)
    if kind == "parenthesized":
        return f"({', '.join(map(type_, inner['inputs']))})" + returned(inner["output"])
    parts = [type_(arg["type"]) if "type" in arg else str(only(arg)[1]) for arg in inner["args"]]
    for constraint in inner["constraints"]:
        how, what = only(constraint["binding"])
        value = f" = {type_(what['type'])}" if how == "equality" else f": {bounds(what)}"
        parts.append(constraint["name"] + args(constraint["args"]) + value)
    return f"<{', '.join(parts)}>" if parts else ""


def returned(output):
    return f" -> {type_(output)}" if output else ""


def type_(node):
    kind, inner = only(node)
    match kind:
        case "generic" | "primitive":
            return inner
        case "resolved_path":
            return path(inner)
        case "borrowed_ref":
            return f"&{inner['lifetime'] + ' ' if inner['lifetime'] else ''}{'mut ' * inner['is_mutable']}{type_(inner['type'])}"
        case "tuple":
            return f"({', '.join(map(type_, inner))})"
        case "slice":
            return f"[{type_(inner)}]"
        case "array":
            return f"[{type_(inner['type'])}; {inner['len']}]"
        case "impl_trait":
            return f"impl {bounds(inner)}"
        case "dyn_trait":
            traits = [forall(part["generic_params"]) + path(part["trait"]) for part in inner["traits"]]
            return "dyn " + " + ".join(traits + [inner["lifetime"]] * bool(inner["lifetime"]))
        case "qualified_path":
            of = f" as {path(inner['trait'])}" if inner["trait"] and inner["trait"]["path"] else ""
            return f"<{type_(inner['self_type'])}{of}>::{inner['name']}{args(inner['args'])}"
        case "function_pointer":
            inputs = ", ".join(type_(given) for _, given in inner["sig"]["inputs"])
            return f"{forall(inner['generic_params'])}fn({inputs}){returned(inner['sig']['output'])}"
    sys.exit(f"the public interface has a type of a kind that {sys.argv[0]} does not know: {kind}")


def forall(params):
    return f"for<{', '.join(param['name'] for param in params)}> " if params else ""


def bounds(nodes):
    parts = []
    for node in nodes:
        kind, inner = only(node)
        if kind == "trait_bound":
            modifier = {"none": "", "maybe": "?"}.get(inner["modifier"], inner["modifier"] + " ")
            parts.append(modifier + forall(inner["generic_params"]) + path(inner["trait"]))
        else:
            parts.append(inner if kind == "outlives" else f"use<{', '.join(only(part)[1] for part in inner)}>")
    return " + ".join(parts)


def generics(node):
    """`<…>` and ` where …`. The parameters that stand for `impl Trait` are written there."""
    params = []
    for param in node["params"]:
        kind, inner = only(param["kind"])
        if inner.get("is_synthetic"):
            continue
        if kind == "const":
            text = f"const {param['name']}: {type_(inner['type'])}"
        else:
            limits = bounds(inner["bounds"]) if kind == "type" else " + ".join(inner["outlives"])
            text = param["name"] + (f": {limits}" if limits else "")
        if kind == "type" and inner["default"]:
            text += f" = {type_(inner['default'])}"
        params.append(text)
    where = []
    for predicate in node["where_predicates"]:
        kind, inner = only(predicate)
        if kind == "bound_predicate":
            where.append(f"{forall(inner['generic_params'])}{type_(inner['type'])}: {bounds(inner['bounds'])}")
        elif kind == "lifetime_predicate":
            where.append(f"{inner['lifetime']}: {' + '.join(inner['outlives'])}")
        else:
            where.append(f"{type_(inner['lhs'])} == {type_(inner['rhs']['type'])}")
    return f"<{', '.join(params)}>" if params else "", f" where {', '.join(where)}" if where else ""


def attributes(node):
    """The features that an item is for, and what else of its attributes users build on."""
    text = " ".join(attr if isinstance(attr, str) else str(next(iter(attr.values()))) for attr in node["attrs"])
    features = sorted(set(re.findall(r'name: "feature", value: Some\("([\w-]+)"\)', text)))
    marks = [f"feature {feature}" for feature in features]
    marks += ["non-exhaustive"] * ("non_exhaustive" in text) + ["must use"] * ("MustUse" in text or "must_use" in text)
    marks += ["deprecated"] * bool(node["deprecation"])
    return f" // {', '.join(marks)}" if marks else ""


lines = set()


def fields(numbers):
    """The public fields, and `…` for each other of a tuple."""
    shown = [item(number) if number is not None else None for number in numbers]
    return [f"{field['name']}: {type_(field['inner']['struct_field'])}" if field else "…" for field in shown]


def shape(kind):
    how, inner = only(kind)
    if how == "tuple":
        return f"({', '.join(fields(inner))})"
    if how in {"plain", "unit"}:
        return ""
    hidden = inner.get("has_stripped_fields")
    return f" {{ {', '.join(fields(inner['fields']) + ['…'] * bool(hidden))} }}"


def function(place, node, prefix=""):
    inner = node["inner"]["function"]
    header = "".join(word + " " for word in ("const", "async", "unsafe") if inner["header"][f"is_{word}"])
    given, where = generics(inner["generics"])
    inputs = ", ".join(f"{name}: {type_(of)}" for name, of in inner["sig"]["inputs"])
    output = returned(inner["sig"]["output"])
    lines.add(f"{prefix}{header}fn {place}::{node['name']}{given}({inputs}){output}{where}{attributes(node)}")


def associated(node):
    """A type or constant of a trait, or of its implementation."""
    kind, inner = only(node["inner"])
    if kind == "assoc_const":
        return f"const {node['name']}: {type_(inner['type'])}", inner["value"] is not None
    given, where = generics(inner["generics"])
    limits = f": {bounds(inner['bounds'])}" if inner["bounds"] else ""
    value = f" = {type_(inner['type'])}" if inner["type"] else ""
    return f"type {node['name']}{given}{limits}{value}{where}", bool(inner["type"])


def implementation(place, node):
    inner = node["inner"]["impl"]
    if inner["blanket_impl"]:
        return
    members = list(filter(None, map(item, inner["items"])))
    given, where = generics(inner["generics"])
    if not inner["trait"]:
        # The bounds stand with each of its items: a block may be split.
        whole = given + where + (" " if given + where else "")
        for member in members:
            if "function" in member["inner"]:
                function(type_(inner["for"]), member, whole)
            else:
                lines.add(f"{whole}{place}: {associated(member)[0]}{attributes(member)}")
        return
    name = inner["trait"]["path"].rsplit("::", 1)[-1]
    if inner["is_synthetic"] and name not in AUTO:
        return
    values = sorted(associated(member)[0] for member in members if "assoc_type" in member["inner"])
    values = f" {{ {'; '.join(values)} }}" if values else ""
    trait = "!" * inner["is_negative"] + path(inner["trait"])
    lines.add(f"impl{given} {trait} for {type_(inner['for'])}{where}{values}{attributes(node)}")


def walk(place, node):
    kind, inner = only(node["inner"])
    if kind == "use":
        target = item(inner["id"])
        if target is None:
            lines.add(f"use {inner['source']} as {place}::{inner['name']}{attributes(node)}")
        elif inner["is_glob"]:
            for number in target["inner"]["module"]["items"]:
                walk(place, item(number))
        else:
            walk(place, target | {"name": inner["name"], "attrs": target["attrs"] + node["attrs"]})
        return
    here = f"{place}::{node['name']}"
    given, where = generics(inner["generics"]) if "generics" in inner else ("", "")
    marks = attributes(node)
    match kind:
        case "module":
            lines.add(f"mod {here}{marks}")
            for number in inner["items"]:
                if child := item(number):
                    walk(here, child)
        case "struct":
            lines.add(f"struct {here}{given}{shape(inner['kind'])}{where}{marks}")
        case "enum":
            lines.add(f"enum {here}{given}{where}{marks}")
            for variant in map(item, inner["variants"]):
                lines.add(f"variant {here}::{variant['name']}{shape(variant['inner']['variant']['kind'])}{attributes(variant)}")
        case "trait":
            limits = f": {bounds(inner['bounds'])}" if inner["bounds"] else ""
            dyn = " // dyn" * inner["is_dyn_compatible"]
            lines.add(f"{'unsafe ' * inner['is_unsafe']}trait {here}{given}{limits}{where}{marks}{dyn}")
            for member in filter(None, map(item, inner["items"])):
                if "function" in member["inner"]:
                    function(here, member, "provided " if member["inner"]["function"]["has_body"] else "required ")
                else:
                    text, provided = associated(member)
                    lines.add(f"{'provided' if provided else 'required'} {here}: {text}{attributes(member)}")
        case "function":
            function(place, node)
        case "type_alias":
            lines.add(f"type {here}{given} = {type_(inner['type'])}{where}{marks}")
        case "constant":
            lines.add(f"const {here}: {type_(inner['type'])}{marks}")
        case "macro":
            lines.add(f"macro {here}{marks}")
        case _:
            sys.exit(f"the public interface has an item of a kind that {sys.argv[0]} does not know: {kind} {here}")
    for number in inner.get("impls", []) + inner.get("implementations", []):
        if (found := item(number)) and found["crate_id"] == 0:
            implementation(here, found)


root = item(data["root"])
for number in root["inner"]["module"]["items"]:
    if child := item(number):
        walk("portcullis", child)
found = sorted(lines)
if sys.argv[2:] == ["--write"]:
    KEPT.write_text("\n".join(found) + "\n")
before = KEPT.read_text().splitlines() if KEPT.exists() else []
if before != found:
    print("\n".join(list(difflib.unified_diff(before, found, lineterm="", n=0))[2:]))
    sys.exit(f"the public interface is not what .ci/{KEPT.name} says; where that is meant: .ci/public-api --write")
print(f"{len(found)} lines of public interface, as .ci/{KEPT.name} says")
