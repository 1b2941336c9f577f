"""A word for each row of a reply, within what a reader accepts as one parameter."""

from collections import Counter
from collections.abc import Sequence

from edge_runtime.core.messages import Scalar
from edge_runtime.core.protocol.oip_checks import LIMITS

#: Stands for the words of many rows that differ; their counts are in the parameter `{name}_counts`.
MIXED = "mixed"


def row_words(name: str, words: Sequence[str]) -> dict[str, Scalar]:
    """The parameter `name` for the words of all rows, of which there is at least one.

    One word where all rows agree; else a word for each row, joined by commas; else, where that is longer than a
    reader accepts (some 150 rows), "mixed" and beside it `{name}_counts`, as in "cache=50,local=974", by falling count.
    """
    if len(set(words)) == 1:
        return {name: words[0]}
    joined = ",".join(words)
    if len(name) + len(joined) <= LIMITS.parameter_bytes:
        return {name: joined}
    counts = ",".join(f"{word}={count}" for word, count in Counter(words).most_common())
    return {name: MIXED, f"{name}_counts": counts}
