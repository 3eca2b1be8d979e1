"""Mutations of adapter folders, each from a number, and what a reader may make of the result.

A folder is its two files as bytes, `{"config": ..., "weights": ...}`. What may be loaded is defined without the reader:
by the safetensors library, `json` and `hashlib`.
"""

import hashlib
import json
import math
import random
import re
import struct

import numpy as np
from safetensors import safe_open

from tests.interop.folders import digest_of

ATOMS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    4,
    0.5,
    "",
    "a",
    "torch<=2.11",
    [],
    {},
    [0],
    2**31,
    2**63,
    2**64,
    10**30,
    1e300,
)
FACTORS = {"RANDLORA": ("randlora_lambda", "randlora_gamma"), "ADALORA": ("lora_A", "lora_E", "lora_B")}
BASES = ("randlora_A", "randlora_B")


class Pairs(list):
    """A JSON object as a list of pairs, in which a key may stand twice."""


def parse(text):
    return json.loads(text, object_pairs_hook=Pairs)


def unparse(value):
    """JSON of such objects; like `json.dumps` where no key stands twice."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {unparse(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(unparse, value)) + "]"
    return json.dumps(value)


def split(weights):
    """Header and data of a safetensors file."""
    end = 8 + struct.unpack("<Q", weights[:8])[0]
    return weights[8:end], weights[end:]


def joined(header, data):
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


# Of bytes


def flip_a_bit(rng, content):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def overwrite(rng, content):
    start, end = span(rng, content)
    return content[:start] + rng.choice([rng.randbytes(end - start), bytes(end - start)]) + content[end:]


def truncate(rng, content):
    return content[: rng.randrange(len(content))]


def insert(rng, content):
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.randbytes(rng.choice((1, 2, 8, 100))) + content[place:]


def delete(rng, content):
    start, end = span(rng, content)
    return content[:start] + content[end:]


def duplicate(rng, content):
    start, end = span(rng, content)
    return content[:end] + content[start:end] + content[end:]


def swap(rng, content):
    a, b, c, d = sorted(rng.choices(range(len(content) + 1), k=4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def span(rng, content):
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 64)))


BYTES = (flip_a_bit, overwrite, truncate, insert, delete, duplicate, swap)


# Of JSON


def mutate_json(rng, text):
    """The text with one node changed, deleted, repeated, wrapped, of another type, or with another digit."""
    tree = parse(text)
    nodes = list(places(tree))
    holder, index = rng.choice(nodes)
    is_object = isinstance(holder, Pairs)
    key, value = holder[index] if is_object else (None, holder[index])
    action = rng.choice(("delete", "repeat", "nest", "atom", "digit", "move", "rename"))
    if action == "delete":
        del holder[index]
    elif action == "repeat":
        holder.insert(rng.randrange(len(holder) + 1), holder[index])
    elif action == "move":
        holder.insert(rng.randrange(len(holder)), holder.pop(index))
    elif action == "rename" and is_object:
        holder[index] = (rng.choice((key + "x", key[:-1], "", key.upper(), rng.choice(holder)[0])), value)
    else:
        changed = {"nest": nested, "atom": lambda rng, _: rng.choice(ATOMS)}.get(action, other_digit)(rng, value)
        holder[index] = (key, changed) if is_object else changed
    return unparse(tree)


def places(tree):
    """Every value inside, as the object or list that holds it and its index there."""
    for index, item in enumerate(tree):
        yield tree, index
        value = item[1] if isinstance(tree, Pairs) else item
        if isinstance(value, list):
            yield from places(value)


def nested(rng, value):
    return rng.choice(([value], Pairs([("a", value)]), [[[value]]], [value, value]))


def other_digit(rng, value):
    """A number or a text with another digit; anything else as an atom."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not re.search(r"\d", str(value)):
        return rng.choice(ATOMS)
    digits = [match.start() for match in re.finditer(r"\d", str(value))]
    place, text = rng.choice(digits), str(value)
    text = text[:place] + rng.choice("0123456789") + text[place + 1 :]
    return type(value)(text)


def mutate_header(rng, weights):
    header, data = split(weights)
    return joined(mutate_json(rng, header).encode(), data)


def mutate_notes(rng, weights, *, sealed):
    """Other notes, and with `sealed` the SHA-256 that goes with them, as somebody writes who means it."""
    header, data = split(weights)
    tree = json.loads(header)
    metadata = tree.get("__metadata__") or {}
    text = mutate_json(rng, metadata.get("randlora", '{"format_version": 1}'))
    metadata["randlora"] = text
    if sealed:
        metadata["randlora_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return joined(json.dumps({**tree, "__metadata__": metadata}).encode(), data)


def splice_header(weights, other):
    return joined(split(other)[0], split(weights)[1])


def mutate(seed, folders):
    """One of `folders` with one mutation, or with two; and whether its notes were changed on purpose, and their sum."""
    rng = random.Random(seed)
    files, sealed = dict(folders[rng.choice(sorted(folders))]), False
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("bytes", "bytes", "bytes", "header", "notes", "sealed notes", "config", "config", "foreign"))
        part = rng.choice(("config", "weights", "weights"))
        other = folders[rng.choice(sorted(folders))]
        try:
            if kind == "bytes":
                files[part] = rng.choice(BYTES)(rng, files[part])
            elif kind == "header":
                files["weights"] = mutate_header(rng, files["weights"])
            elif kind == "config":
                files["config"] = mutate_json(rng, files["config"].decode()).encode()
            elif kind == "foreign":
                foreign = {"config": other["config"], "weights": splice_header(files["weights"], other["weights"])}
                files[part] = rng.choice((foreign, other))[part]
            else:
                files["weights"] = mutate_notes(rng, files["weights"], sealed=kind == "sealed notes")
                sealed |= kind == "sealed notes"
        except (ValueError, struct.error, AttributeError, IndexError, KeyError, TypeError):
            continue  # the first mutation left nothing for the second to change
    return files, sealed


# What may be loaded


def read_independently(files, scratch):
    """Tensors, metadata and config by the safetensors library and json; raises whatever they raise."""
    scratch.write_bytes(files["weights"])
    with safe_open(scratch, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, file.metadata() or {}, json.loads(files["config"].decode("utf-8-sig"))


def check_reading(adapter, files, scratch):
    """Assert that an adapter is what the files say: no number, name, field or shape more, less or other."""
    tensors, metadata, config = read_independently(files, scratch)
    check_config(adapter.config, config)
    kind = FACTORS[config.get("peft_type", "RANDLORA")]
    bases = {key: value for key, value in tensors.items() if kind is FACTORS["RANDLORA"] and ends_in(key, BASES)}
    trained = {key: value for key, value in tensors.items() if key not in bases}
    loaded = dict(adapter.saved_weights)
    for name, parts in adapter.factors.items():
        loaded |= {f"base_model.model.{name}.{part}": value for part, value in zip(kind, parts, strict=True)}
    assert_same(loaded, trained)
    assert all(np.isfinite(value.astype(np.float64)).all() for value in tensors.values())
    for key, value in bases.items():
        assert_same({key: adapter.bases[BASES.index(key.rpartition(".")[2])]}, {key: value})
    notes = json.loads(metadata["randlora"]) if "randlora" in metadata else {}
    assert ("randlora" in metadata) == ("randlora_sha256" in metadata)
    if notes:
        assert metadata["randlora_sha256"] == hashlib.sha256(metadata["randlora"].encode()).hexdigest()
        assert notes["tensors_sha256"] in (None, digest_of(trained))
    if notes.get("shapes") is not None or kind is FACTORS["RANDLORA"]:
        shapes = {name: tuple(shape) for name, shape in (notes.get("shapes") or {}).items()}
        assert adapter.shapes == (shapes or None)
    if adapter.bases is not None:
        assert bases or (notes["recipe"] and notes["max_dim"] and notes["min_dim"])
        assert not notes or notes["bases_sha256"] == digest_of_bases(adapter.bases)
    if notes.get("recipe"):
        assert adapter.recipe == notes["recipe"]


def ends_in(key, parts):
    return key.rpartition(".")[2] in parts


def assert_same(loaded, wanted):
    assert loaded.keys() == wanted.keys()
    for key, value in wanted.items():
        got = np.asarray(loaded[key])
        assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes()), key


def digest_of_bases(bases):
    """The `bases_sha256` of FORMAT.md."""
    parts = (str(tuple(array.shape)).encode() + array.astype("<f4").tobytes() for array in bases)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check_config(config, fields):
    """Assert that a config holds the fields of its file, and PEFT's defaults where the file has none."""
    got = config.to_dict()
    defaults = {**type(config)(inference_mode=True).to_dict(), "peft_type": "RANDLORA"}
    wanted = {**{name: value for name, value in defaults.items() if name in got}, **fields}
    if wanted.get("exclude_modules", 0) is None and "exclude_modules" not in got:
        del wanted["exclude_modules"]
    if isinstance(wanted.get("rank_pattern"), dict):  # in memory, PEFT appends the name of the adapter
        pattern = {re.sub(r"(?s)(\.lora_E)\.[^.]+$", r"\1", key): mask for key, mask in wanted["rank_pattern"].items()}
        wanted["rank_pattern"] = pattern or None
    assert {name: canonical(value) for name, value in got.items()} == {
        name: canonical(value) for name, value in wanted.items()
    }


def canonical(value):
    """JSON of a field, by which True is not 1."""
    assert not isinstance(value, float) or math.isfinite(value)
    return json.dumps(value, sort_keys=True)
