"""Damaged files by the hundred, drawn from a seed: what disks, editors and half-finished downloads make of good ones."""
import json
import struct

# what somebody's tool may have put in the place of a value
ODD = (None, True, False, -1, 0, 0.5, 1e308, 10 ** 30, -10 ** 30, float("nan"), float("inf"), "", "x", "12", "\ud800", [], {}, [1], {"a": 1},
       "a" * 10_000)


def of_bytes(good, rng):
    """One damaged copy of a file: cut off, grown, zeroed, overwritten, shuffled, or with single bits flipped."""
    data = bytearray(good)
    n = len(data)
    at = rng.randrange(n + 1)
    size = min(n - at, rng.choice((1, 2, 7, 64, 4096)))
    kind = rng.choice(("cut", "empty", "grow", "zero", "noise", "flip", "remove", "twice", "swap", "text", "insert"))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "empty":
        return b""
    if kind == "grow":
        return bytes(data + rng.randbytes(rng.choice((1, 3, 1000))))
    if kind == "zero":
        data[at:at + size] = bytes(size)
    elif kind == "noise":
        data[at:at + size] = rng.randbytes(size)
    elif kind == "flip" and n:
        data[at - 1] ^= 1 << rng.randrange(8)
    elif kind == "remove":
        del data[at:at + size]
    elif kind == "twice":
        data[at:at] = data[at:at + size]
    elif kind == "swap":
        return bytes(data[at:] + data[:at])
    elif kind == "text":
        return rng.choice((b"<html>502 Bad Gateway</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
                           b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"null", b"[" * 100_000, b'{"a":' * 100_000))
    elif kind == "insert":
        data[at:at] = rng.choice((b"\0", b"\n", b"\r\n", b"NaN", b"}", b'"', b"99999999999999999999", b"\xe9"))
    return bytes(data)


def places(value, path=()):
    """The paths of all values in nested objects and lists, the whole among them."""
    found = [path]
    if isinstance(value, dict):
        for key, part in value.items():
            found += places(part, (*path, key))
    if isinstance(value, list):
        for i, part in enumerate(value[:50]):
            found += places(part, (*path, i))
    return found


def of_json(good, rng):
    """One copy of a JSON file's text in which a value is odd, missing, under another name, or there twice."""
    value = json.loads(good)
    path = rng.choice(places(value))
    if not path:
        return json.dumps(rng.choice(ODD))
    holder = value
    for step in path[:-1]:
        holder = holder[step]
    last = path[-1]
    kind = rng.choice(("odd", "odd", "odd", "missing", "renamed"))
    if kind == "odd":
        holder[last] = rng.choice(ODD)
    elif kind == "missing":
        del holder[last]
    elif isinstance(holder, dict):
        holder[str(last).upper() + rng.choice(("", " ", "_"))] = holder.pop(last)
    return json.dumps(value)


def of_safetensors(good, rng):
    """One copy of a safetensors file: its header is damaged as JSON, its lengths lie, or its bytes are damaged."""
    n, = struct.unpack("<Q", good[:8])
    header, body = good[8:8 + n], good[8 + n:]
    kind = rng.choice(("header", "header", "dtype", "length", "bytes", "body"))
    if kind == "bytes":
        return of_bytes(good, rng)
    if kind == "body":
        data = bytearray(body)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return good[:8 + n] + bytes(data)
    if kind == "length":
        return struct.pack("<Q", rng.choice((0, 1, n - 1, n + 1, 2 ** 40, 2 ** 63))) + header + body
    if kind == "dtype":
        new = header.replace(b'"F32"', rng.choice((b'"F16"', b'"I32"', b'"BOOL"', b'"F8_E4M3"', b'"U8"', b'"BF16"', b'"F64"')),
                             rng.choice((1, 100)))
    else:
        new = of_json(header, rng).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + body
