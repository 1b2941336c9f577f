"""The commands that ask a model: of the running daemon or, without one, in this process."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from edge_runtime.cli.options import config_option, json_option, reports_errors

if TYPE_CHECKING:
    from edge_runtime.client import Client
    from edge_runtime.config import Config
    from edge_runtime.core.messages import InferReply, InferRequest

_CONNECT_S = 2.0  # how long an unsure answer waits for the broker: a handshake with TLS over a slow link


@click.command()
@click.argument("text")
@click.option("--model", default="commands", show_default=True)
@click.option("--private", is_flag=True, help="Never let this request leave the device.")
@click.option("--no-cache", is_flag=True, help="Compute the answer even if it is known.")
@config_option
@json_option
@reports_errors
def ask(text: str, model: str, private: bool, no_cache: bool, config_path: Path | None, as_json: bool) -> int:
    """Ask one question.

    The running daemon answers; without one, this process loads the model.

    \b
    Examples:
      edge-runtime ask "turn the lights off"
      edge-runtime ask --json "what is the weather in Oslo" | jq .intent
    """
    from edge_runtime.cli.intent import describe, intent_of
    from edge_runtime.core.messages import InferRequest, Tensor

    if not text.strip():
        raise click.UsageError("There is nothing to ask; give the command in quotes.")
    parameters: dict[str, Any] = {}
    if private:
        parameters["private"] = True
    if no_cache:
        parameters["cache"] = False
    raw = text.encode("utf-8", "surrogateescape")
    request = InferRequest((Tensor("text", "BYTES", (1,), (raw,)),), parameters=parameters)
    answer = intent_of(_infer(model, request, config_path))
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
    else:
        click.echo(describe(answer))
    return 3 if answer["degraded"] else 0


@click.command()
@click.argument("model")
@click.argument("file", type=click.File("rb"))
@config_option
@reports_errors
def infer(model: str, file: BinaryIO, config_path: Path | None) -> int:
    """Send a request file to a model.

    FILE is an Open Inference Protocol request in JSON, or - for stdin. The reply is printed as JSON. The exit code is 3
    if an answer in it is degraded.

    \b
    Examples:
      edge-runtime infer commands request.json
      echo '{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["hi"]}]}' | edge-runtime infer commands -
    """
    from dataclasses import replace

    from edge_runtime.core.protocol import oip

    reply = _infer(model, oip.decode_request(file.read(), None), config_path)
    body, _ = oip.encode_reply(replace(reply, binary_outputs=frozenset()))
    click.echo(body.decode("utf-8"))
    return 3 if reply.parameters.get("degraded") else 0


def connect(config_path: Path | None) -> "Client | None":
    """A client of the running daemon, or None where none runs."""
    from edge_runtime.client import Client
    from edge_runtime.config import load_config, socket_path

    path = socket_path(load_config(config_path))
    return Client(path) if path is not None and path.is_socket() and Client(path).is_alive() else None


def absence(config_path: Path | None) -> str:
    """A sentence that says where no daemon was found."""
    from edge_runtime.config import load_config, socket_path

    path = socket_path(load_config(config_path))
    if path is None:
        return '[server] socket is "off", and commands reach a daemon by its socket. Write socket = "auto".'
    return f"No daemon listens on {path}; start one with: edge-runtime serve"


def _infer(model: str, request: "InferRequest", config_path: Path | None) -> "InferReply":
    client = connect(config_path)
    if client is not None:
        return client.infer(model, request)
    import asyncio

    return asyncio.run(infer_here(model, request, _with_model(config_path, model)))


async def infer_here(model: str, request: "InferRequest", config: "Config") -> "InferReply":
    """Answer in this process. The device is asked first; only if it is unsure, the broker is waited for.

    The connection to the broker has just begun, so an unsure first answer would always miss the cloud by a handshake.
    Raises the errors of `Runtime.open` and `Runtime.infer`.
    """
    from edge_runtime.runtime import Runtime

    async with Runtime.open(config) as runtime:
        reply = await runtime.infer(model, request)
        if runtime.uplink is None or not reply.parameters["degraded"]:
            return reply
        if not await runtime.uplink.wait_connected(_CONNECT_S):
            return reply
        return await runtime.infer(model, request)


def _with_model(config_path: Path | None, model: str) -> "Config":
    """The configuration; where it does not list models, only the one that is asked is loaded."""
    from msgspec.structs import replace

    from edge_runtime.config import Config, load_config

    config = load_config(config_path)
    return replace(config, models=(model,)) if config.models == Config().models else config
