"""The texts of a soak, and what each tier says of them when nothing else runs."""

from pathlib import Path

from examples.demo import COMMANDS
from tools.soak.account import Asked, Known, Verdict, origins_of
from tools.soak.connection import Connection, infer

#: They make easy texts less sure, so that a part of every load is escalated.
FRAMES = ("{}", "please {}", "{} now", "hey, {}", "i said {}", "{} or not", "could you {}", "well {} then")
TEXTS = tuple(frame.format(command) for command in COMMANDS for frame in FRAMES)
_AT_ONCE = 16


async def known_texts(edge: Path, cloud: Path) -> dict[str, Known]:
    """Ask both tiers while they are quiet. Raises ValueError where one does not answer.

    `edge` is the socket of the daemon under test, which has a cloud; `cloud` that of a daemon which serves the cloud's
    model, so that it tells what the cloud alone would say.
    """
    local = await _verdicts(edge, is_private=True)
    alone = await _verdicts(cloud, is_private=True)
    joined = await _verdicts(edge, is_private=False)
    return {
        text: Known(
            local[text][0],
            (alone[text][0], *[verdict for verdict, origin in [joined[text]] if origin == "cloud"]),
        )
        for text in TEXTS
    }


async def _verdicts(socket: Path, *, is_private: bool) -> dict[str, tuple[Verdict, str]]:
    found: dict[str, tuple[Verdict, str]] = {}
    connection = await Connection.open(str(socket))
    for start in range(0, len(TEXTS), _AT_ONCE):
        texts = TEXTS[start : start + _AT_ONCE]
        status, reply = await connection.ask(infer(Asked(f"known-{start}", texts, is_private), cache=False))
        if status != 200 or reply["parameters"].get("degraded"):
            raise ValueError(f"the quiet daemon did not answer for sure: {status} {reply}")
        outputs = {output["name"]: output["data"] for output in reply["outputs"]}
        verdicts = zip(outputs["intent"], outputs["confidence"], strict=True)
        found |= zip(texts, zip(verdicts, origins_of(reply, len(texts)), strict=True), strict=True)
    connection.close()
    return found
