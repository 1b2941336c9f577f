"""Broken model files, reproducible: each is made of a real one by a few damages that a seed decides."""

import random

ODD = (0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def mutants(originals, seed, count, damages):
    """Yield `count` damaged copies of `originals` (a list of bytes)."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        data = rng.choice(originals)
        for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
            data = rng.choice(damages)(rng, data, rng.choice(originals))
        yield data


def flip_bytes(rng, data, _):
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng, data, _):
    return data[: rng.randrange(len(data) + 1)]


def splice(rng, data, donor):
    """A stretch of another file in place of one, of the same length or not."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    first, last = sorted(rng.randrange(len(donor) + 1) for _ in range(2))
    return data[:start] + donor[first:last] + data[end:]


def repeat(rng, data, _):
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randint(1, 64)]
    return data[:start] + piece * rng.randint(2, 50) + data[start:]


def odd_word(rng, data, _):
    """A little-endian word that means something in flatbuffers: an offset, a length, a count."""
    changed, width = bytearray(data), rng.choice((2, 4))
    if len(changed) >= 8:
        at = rng.randrange(len(changed) // width) * width
        old = int.from_bytes(changed[at : at + width], "little")
        new = rng.choice((*ODD, old + 1, old - 1, old * 2, old + 4, old - 4)) % (1 << 8 * width)
        changed[at : at + width] = new.to_bytes(width, "little")
    return bytes(changed)


def swap_words(rng, data, _):
    changed, width = bytearray(data), rng.choice((2, 4, 8))
    if len(changed) >= 2 * width:
        one, other = (rng.randrange(len(changed) // width) * width for _ in range(2))
        piece = bytes(changed[one : one + width])
        changed[one : one + width] = changed[other : other + width]
        changed[other : other + width] = piece
    return bytes(changed)


def change_field(rng, data, donor):
    """Swap, repeat, drop, borrow or change one field of a protobuf message, at a depth chosen by chance.

    Lengths around it are mended, so that the damage reaches whoever reads the field.
    """
    fields = _fields(data)
    if not fields:
        return flip_bytes(rng, data, donor)
    at = rng.randrange(len(fields))
    tag, value = fields[at]
    nested = isinstance(value, bytes) and len(value) > 1 and rng.random() < 0.75
    if nested:
        fields[at] = (tag, change_field(rng, value, donor))
    else:
        what = rng.randrange(5)
        if what == 0:
            other = rng.randrange(len(fields))
            fields[at], fields[other] = (tag, fields[other][1]), (fields[other][0], value)
        elif what == 1:
            fields[at:at] = [fields[at]] * rng.choice((1, 2, 100))
        elif what == 2:
            del fields[at]
        elif what == 3:
            borrowed = _fields(donor)
            fields.insert(at, rng.choice(borrowed) if borrowed else fields[at])
        elif isinstance(value, int):
            fields[at] = (tag, rng.choice((*ODD, 2**40, 2**63 - 1, 2**64 - 1, value + 1)))
        else:
            fields[at] = (tag, flip_bytes(rng, value, donor))
    return b"".join(_field(tag, value) for tag, value in fields)


def odd_length(rng, data, donor):
    """A length of a protobuf field that its message has no room for, or that leaves something over."""
    changed = bytearray(data)
    if changed:
        at = rng.randrange(len(changed))
        changed[at : at + 1] = _varint(rng.choice((*ODD, 2**40, 2**64 - 1)))
    return bytes(changed)


ONNX = (flip_bytes, truncate, splice, repeat, change_field, change_field, change_field, odd_length)
TFLITE = (flip_bytes, truncate, splice, repeat, odd_word, odd_word, odd_word, swap_words)


def _fields(data):
    """(tag, int or bytes) of a protobuf message; [] for what is none."""
    found, at = [], 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            kind = tag & 7
            if kind == 0:
                value, at = _read_varint(data, at)
            else:
                length = {1: 8, 5: 4}.get(kind)
                if length is None:
                    if kind != 2:
                        return []
                    length, at = _read_varint(data, at)
                value, at = data[at : at + length], at + length
            found.append((tag, value))
    except IndexError:
        return []
    return found if at == len(data) else []


def _field(tag, value):
    if isinstance(value, int):
        return _varint(tag & ~7) + _varint(value)
    kind = {8: 1, 4: 5}.get(len(value)) if tag & 7 in (1, 5) else 2
    if kind is None:
        kind = 2
    return _varint(tag & ~7 | kind) + (_varint(len(value)) if kind == 2 else b"") + value


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128 or shift > 63:
            return value, at
