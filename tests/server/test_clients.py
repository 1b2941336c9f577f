"""Clients as Debian has them, with their defaults: each once failed against this server."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading

import pytest

from edge_runtime.config import Config, ServerSettings
from edge_runtime.runtime import Runtime
from edge_runtime.server import start_server

PATH = "/v2/models/commands/infer"
TEXTS = {"turn the lights off": "smart_home", "flip a coin": "flip_coin", "tell me a joke": "tell_joke"}
LIMIT_S = 60


def body(text):
    return json.dumps({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]})


def program(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def served():
    """The runtime behind its server on a loop of its own, as in the daemon; yields the URL."""
    ready, stop = threading.Event(), threading.Event()
    urls = []

    async def serve():
        async with Runtime.open(Config(server=ServerSettings(tcp="off"))) as runtime:
            server = await start_server(runtime, socket_path=None, tcp=("127.0.0.1", 0))
            urls.append(server.addresses[0])
            ready.set()
            await asyncio.to_thread(stop.wait)
            await server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(LIMIT_S)
        yield urls[0]
    finally:
        stop.set()
        thread.join()


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def intents(lines):
    return [json.loads(line)["outputs"][0]["data"][0] for line in lines.splitlines() if line]


JAVA = """
import java.net.URI;
import java.net.http.*;
public class Ask {
  public static void main(String[] words) throws Exception {
    HttpClient client = HttpClient.newHttpClient();  // offers h2c with each request
    for (int i = 1; i < words.length; i++) {
      HttpRequest request = HttpRequest.newBuilder(URI.create(words[0]))
        .POST(HttpRequest.BodyPublishers.ofString(words[i])).build();
      HttpResponse<String> reply = client.send(request, HttpResponse.BodyHandlers.ofString());
      if (reply.statusCode() != 200) { System.err.println(reply.body()); System.exit(1); }
      System.out.println(reply.body());
    }
    URI live = URI.create(words[0]).resolve("/v2/health/live");
    HttpRequest head = HttpRequest.newBuilder(live).method("HEAD", HttpRequest.BodyPublishers.noBody()).build();
    for (int i = 0; i < 3; i++)
      if (client.send(head, HttpResponse.BodyHandlers.ofString()).statusCode() != 200) System.exit(2);
  }
}
"""


def test_the_http_client_of_java(tmp_path):
    java = program("java")
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    if "jdk.compiler" not in run(java, "--list-modules"):
        pytest.skip("java has no compiler (a JRE): apt-get install default-jdk-headless")
    with served() as url:
        answers = run(java, str(source), url + PATH, *(body(text) for text in TEXTS))
    assert intents(answers) == list(TEXTS.values())


NODE = """
const http = require('http');
const [url, ...bodies] = process.argv.slice(2);
const agent = new http.Agent({keepAlive: true, maxSockets: 1});
function ask(method, path, body) {
  return new Promise((resolve, reject) => {
    const request = http.request(new URL(path, url), {method, agent}, reply => {
      let text = '';
      reply.on('data', piece => text += piece);
      reply.on('end', () => resolve([reply.statusCode, text]));
    });
    request.on('error', reject);
    request.end(body);
  });
}
(async () => {
  for (const body of bodies) {
    const [alive, nothing] = await ask('HEAD', '/v2/health/live');
    const [status, text] = await ask('POST', url, body);
    if (alive !== 200 || nothing !== '' || status !== 200) throw new Error(text);
    console.log(text);
  }
  agent.destroy();
})();
"""


def test_node_with_one_kept_connection(tmp_path):
    node = program("node")
    script = tmp_path / "ask.js"
    script.write_text(NODE)
    with served() as url:
        answers = run(node, str(script), url + PATH, *(body(text) for text in TEXTS))
    assert intents(answers) == list(TEXTS.values())


def test_fetch_of_node(tmp_path):
    script = tmp_path / "ask.mjs"
    script.write_text(
        "const [url, ...bodies] = process.argv.slice(2);\n"
        "const replies = await Promise.all(bodies.map(body => fetch(url, {method: 'POST', body})));\n"
        "for (const reply of replies) console.log(await reply.text());\n"
    )
    with served() as url:
        answers = run(program("node"), str(script), url + PATH, *(body(text) for text in TEXTS))
    assert intents(answers) == list(TEXTS.values())


def test_aiohttp_with_its_default_pool():
    """A hundred connections at once, kept; HEAD between the requests."""
    aiohttp = pytest.importorskip("aiohttp")

    async def ask(session, url, text):
        async with session.head(f"{url}/v2/health/live") as alive:
            assert (alive.status, await alive.read()) == (200, b"")
        async with session.post(url + PATH, data=body(text)) as reply:
            assert reply.status == 200
            return (await reply.json())["outputs"][0]["data"][0]

    async def scenario(url):
        async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
            texts = list(TEXTS) * 100
            found = await asyncio.gather(*(ask(session, url, text) for text in texts))
            assert found == [TEXTS[text] for text in texts]

    with served() as url:
        asyncio.run(scenario(url))


def test_wget(tmp_path):
    wget = program("wget")
    with served() as url:
        for text, intent in TEXTS.items():
            (tmp_path / "body").write_text(body(text))
            answer = run(wget, "-q", "-O", "-", f"--post-file={tmp_path}/body", url + PATH)
            assert intents(answer) == [intent]
        run(wget, "-q", "--spider", "--timeout=20", "--tries=1", f"{url}/v2/health/live")  # HEAD


@pytest.mark.parametrize("option", ["--http2", "--http1.0", "--http1.1", "--head", "--expect100-timeout=20"])
def test_curl(option, tmp_path):
    curl = program("curl")
    with served() as url:
        common = (curl, "-sS", "--fail", "--max-time", "20")
        if option == "--head":
            answer = run(*common, "--head", f"{url}/v2/health/live", f"{url}/v2/health/ready")
            assert answer.count("HTTP/1.1 200 OK") == 2
        elif option == "--expect100-timeout=20":
            (tmp_path / "body").write_text(body("x" * 4000))
            expect = ("-H", "Expect: 100-continue", "--expect100-timeout", "20")
            assert intents(run(*common, *expect, "--data-binary", f"@{tmp_path}/body", url + PATH))
        else:
            texts = [
                part for text in TEXTS for part in ("--next", "-sS", "--fail", "-d", body(text), url + PATH)
            ]
            answers = [run(*common, option, "-d", body(text), url + PATH) for text in TEXTS]
            assert [intents(answer)[0] for answer in answers] == list(TEXTS.values())
            assert "smart_home" in run(curl, *texts[1:])  # one connection for all


def test_eighty_clients_that_keep_their_connections():
    """More than there once were places for: 17 of 100 requests were cut off."""
    import http.client

    failures = []

    def client(host, port):
        connection = http.client.HTTPConnection(host, port, timeout=LIMIT_S)
        try:
            for _ in range(20):
                connection.request("POST", PATH, body("flip a coin"))
                reply = connection.getresponse()
                if reply.status != 200:
                    failures.append(reply.status)
                reply.read()
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)
        finally:
            connection.close()

    with served() as url:
        host, port = url.removeprefix("http://").split(":")
        clients = [threading.Thread(target=client, args=(host, int(port))) for _ in range(80)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert failures == []
