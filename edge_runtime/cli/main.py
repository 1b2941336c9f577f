"""The command line: thin over the library. Data goes to stdout, notes to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused, or answered degraded.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import click

from edge_runtime import __version__
from edge_runtime.cli.intent import describe, intent_of
from edge_runtime.core.errors import ConfigError, EdgeRuntimeError, Refused

P = ParamSpec("P")

_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="TOML file; without it the defaults hold.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def _guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """Turn our errors into one sentence and an honest exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except ConfigError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Refused as error:
            click.echo(f"refused: {error}", err=True)
            sys.exit(3)
        except EdgeRuntimeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        sys.exit(code or 0)

    return run


class _Suggesting(click.Group):
    """A group that answers a mistyped command with the near one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.format_message()} Did you mean {near[0]!r}?", ctx) from None


@click.group(cls=_Suggesting, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-runtime")
def main() -> None:
    """Run small models on this device; ask the cloud only when unsure and allowed.

    \b
    Examples:
      edge-runtime ask "turn the lights off"
      edge-runtime serve --config edge.toml
    """


@main.command()
@_config_option
@_guarded
def serve(config_path: Path | None) -> None:
    """Run the daemon until SIGTERM.

    \b
    Examples:
      edge-runtime serve
      edge-runtime serve --config edge.toml
    """
    from edge_runtime.config import load_config

    config = load_config(config_path)
    from edge_runtime.daemon import run

    run(config)


@main.command()
@click.argument("text")
@click.option("--model", default="commands", show_default=True)
@click.option("--private", is_flag=True, help="Never let this request leave the device.")
@click.option("--no-cache", is_flag=True, help="Compute anew even if the answer is known.")
@_config_option
@_json_option
@_guarded
def ask(text: str, model: str, private: bool, no_cache: bool, config_path: Path | None, as_json: bool) -> int:
    """Ask one question, of the running daemon or, without one, right here.

    \b
    Examples:
      edge-runtime ask "turn the lights off"
      edge-runtime ask --json "what is the weather in Oslo" | jq .intent
    """
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


@main.command()
@click.argument("model")
@click.argument("file", type=click.File("rb"))
@_config_option
@_guarded
def infer(model: str, file: Any, config_path: Path | None) -> None:
    """Send FILE (an Open Inference Protocol request in JSON; - for stdin) to MODEL; print the JSON reply.

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


def _infer(model: str, request: Any, config_path: Path | None) -> Any:
    client = _client(config_path)
    if client is not None:
        return client.infer(model, request)

    async def here() -> Any:
        from edge_runtime.runtime import Runtime

        async with Runtime.open(_with_model(config_path, model)) as runtime:
            if runtime.uplink is not None:
                await runtime.uplink.wait_connected(
                    2.0
                )  # a first answer should not miss the cloud by a handshake
            return await runtime.infer(model, request)

    return asyncio.run(here())


def _with_model(config_path: Path | None, model: str) -> Any:
    """The configuration; where it does not list models, the one that is asked is loaded, and no other."""
    from msgspec.structs import replace

    from edge_runtime.config import Config, load_config

    config = load_config(config_path)
    return replace(config, models=(model,)) if config.models == Config().models else config


def _client(config_path: Path | None) -> Any:
    """A client of the running daemon, or None where none runs."""
    from edge_runtime.client import Client
    from edge_runtime.config import load_config, socket_path

    path = socket_path(load_config(config_path))
    return Client(path) if path is not None and path.is_socket() and Client(path).is_alive() else None


@main.command()
@_config_option
@_json_option
@_guarded
def status(config_path: Path | None, as_json: bool) -> None:
    """Show what the running daemon does.

    \b
    Examples:
      edge-runtime status
      edge-runtime status --json | jq .cloud
    """
    client = _client(config_path)
    if client is None:
        raise EdgeRuntimeError("No daemon runs here; start one with: edge-runtime serve")
    tree = client.get("/status")
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_status

    print_status(tree)


@main.group(cls=_Suggesting)
def models() -> None:
    """List, show, verify and sign model bundles."""


@models.command("list")
@_config_option
@_json_option
@_guarded
def models_list(config_path: Path | None, as_json: bool) -> None:
    """List the configured models."""
    from edge_runtime.bundles.folder import find_bundle, load_bundle
    from edge_runtime.config import load_config
    from edge_runtime.runtime import first_loads_of

    rows = []
    config = load_config(config_path)
    first_loads = first_loads_of(config)
    for name in config.models:
        bundle = load_bundle(find_bundle(name))
        manifest = bundle.manifest
        report = first_loads.report_of(bundle.digest)
        rows.append(
            {
                "name": manifest.name,
                "version": manifest.version,
                "task": manifest.task,
                "engine": manifest.engine,
                "bytes": sum(entry.size for entry in manifest.files),
                "memory_mb": None if report is None else round(report.memory_bytes / 1e6, 1),
                "digest": bundle.digest,
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    from edge_runtime.cli.tables import print_models

    print_models(rows)


@models.command("show")
@click.argument("bundle")
@_config_option
@_json_option
@_guarded
def models_show(bundle: str, config_path: Path | None, as_json: bool) -> None:
    """Show a bundle's manifest, and what loading it costs and how it may be batched. BUNDLE is a name or a path."""
    import msgspec

    from edge_runtime.config import load_config
    from edge_runtime.loading.model import cost_of, load_model
    from edge_runtime.runtime import first_loads_of

    config = load_config(config_path)
    model = load_model(
        bundle, threads=config.threads, max_batch=config.batch.max, first_loads=first_loads_of(config)
    )
    tree = msgspec.to_builtins(model.manifest)
    tree["digest"] = model.digest
    tree["loaded"] = cost_of(model.info)
    model.engine.close()
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_manifest

    print_manifest(tree)


@models.command("verify")
@click.argument("bundle")
@click.option("--again", is_flag=True, help="Also try its first load anew, whatever came of it before.")
@_config_option
@_json_option
@_guarded
def models_verify(bundle: str, again: bool, config_path: Path | None, as_json: bool) -> None:
    """Check signature and every digest of a bundle. BUNDLE is a name or a path; exit code 1 if it must not be used.

    \b
    Examples:
      edge-runtime models verify commands
      edge-runtime models verify ./my-bundle --config edge.toml     # with the keys that edge.toml trusts
      edge-runtime models verify commands --again                  # lift the quarantine of failed first loads
    """
    from edge_runtime.bundles.folder import find_bundle, load_bundle
    from edge_runtime.bundles.trust import read_trust
    from edge_runtime.config import load_config

    config = load_config(config_path)
    trust = read_trust(config.trust.keys, allow_unsigned=config.trust.unsigned)
    loaded = load_bundle(find_bundle(bundle), trust)
    manifest = loaded.manifest
    if again:
        from edge_runtime.runtime import first_loads_of

        first_loads = first_loads_of(config)
        first_loads.forget(loaded.digest)
        first_loads.admit(loaded, threads=config.threads, max_batch=min(manifest.batch.max, config.batch.max))
    result = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": loaded.digest,
        "signed_by": loaded.signed_by,
        "ok": True,
    }
    signer = f"signed by {loaded.signed_by}" if loaded.signed_by else "not signed"
    line = f"ok: {manifest.name} {manifest.version} sha256:{loaded.digest}, {signer}"
    click.echo(json.dumps(result) if as_json else line)


@models.command("keygen")
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
@_guarded
def models_keygen(path: Path, as_json: bool) -> None:
    """Make a key pair: PATH signs bundles and stays with you, PATH.pub is for [trust] keys of your devices.

    \b
    Examples:
      edge-runtime models keygen my-key
    """
    import os

    from edge_runtime.bundles.signing import generate, key_id

    private, public = generate()
    public_path = path.with_name(path.name + ".pub")
    try:
        # O_EXCL: a key that is overwritten is lost, and with it every device that trusts it alone.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(private)
        with public_path.open("xb") as file:
            file.write(public)
    except OSError as error:
        raise EdgeRuntimeError(
            f"{error.filename} cannot be written ({error.strerror}); choose another name."
        ) from None
    result = {"private": str(path), "public": str(public_path), "key": key_id(public)}
    click.echo(
        json.dumps(result) if as_json else f"key {result['key']}: {path} (keep it secret) and {public_path}"
    )


@models.command("pack")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Private key to sign with, as keygen wrote it.")
@_json_option
@_guarded
def models_pack(source: Path, out: Path, key: Path | None, as_json: bool) -> None:
    """Make the bundle OUT from folder SOURCE: manifest.json (without files and format) and plain payloads.

    \b
    Examples:
      edge-runtime models pack ./my-model ./my-bundle --key my-key
    """
    from edge_runtime.bundles.folder import pack_folder, sign_bundle

    bundle = pack_folder(source, out)
    if key is not None:
        bundle = sign_bundle(out, _private_key(key))
    manifest = bundle.manifest
    result = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": bundle.digest,
        "bytes": bundle.stored_bytes,
        "signed": key is not None,
    }
    state = "signed" if key is not None else "not signed"
    line = f"packed: {manifest.name} {manifest.version}, {bundle.stored_bytes:,} bytes, {state}"
    click.echo(json.dumps(result) if as_json else line)


def _private_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgeRuntimeError(
            f"{path} cannot be read ({error.strerror}); give the file keygen wrote."
        ) from None


@models.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key that keygen wrote.")
@_json_option
@_guarded
def models_sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign the bundle in folder BUNDLE, in place of earlier signatures.

    \b
    Examples:
      edge-runtime models sign ./my-bundle --key my-key
    """
    from edge_runtime.bundles.folder import sign_bundle

    loaded = sign_bundle(bundle, _private_key(key))
    result = {"name": loaded.manifest.name, "version": loaded.manifest.version, "digest": loaded.digest}
    line = f"signed: {result['name']} {result['version']} sha256:{loaded.digest}"
    click.echo(json.dumps(result) if as_json else line)


@main.group(cls=_Suggesting)
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
@_guarded
def config_check(path: Path, as_json: bool) -> None:
    """Check a configuration file; exit code 2 with file, key and fix where it cannot be used."""
    from edge_runtime.config import load_config

    load_config(path)
    click.echo(json.dumps({"path": str(path), "ok": True}) if as_json else f"ok: {path}")


@config.command("show")
@_config_option
@_json_option
@_guarded
def config_show(config_path: Path | None, as_json: bool) -> None:
    """Show the configuration as it takes effect, defaults included."""
    import msgspec

    from edge_runtime.config import load_config, socket_path

    effective = load_config(config_path)
    tree = msgspec.to_builtins(effective)
    tree["server"]["socket"] = str(socket_path(effective) or "off")
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_config

    print_config(tree)
