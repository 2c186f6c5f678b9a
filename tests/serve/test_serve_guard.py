"""Who is answered, and how much may be sent."""

from __future__ import annotations

import asyncio

import pytest
from fastapi.testclient import TestClient

from vclipseg.serve import guard
from vclipseg.serve.app import create_app
from vclipseg.serve.command import is_loopback
from vclipseg.serve.guard import Guard, Limits, address, cookie_of, hostname

TOKEN = "a-token-of-some-length"


@pytest.fixture
def guarded(runs):
    """Makes clients of guarded servers."""
    opened = []

    def make(base_url="http://localhost:8000", **settings):
        client = TestClient(create_app(runs, **settings), base_url=base_url)
        opened.append(client)
        return client.__enter__()

    yield make
    for client in opened:
        client.__exit__(None, None, None)


# Names and origins


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_are_answered(client, host):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example:8000", "localhost.evil.example", "192.168.0.1", "", "[", "localhost@evil"],
)
def test_other_names_are_not(client, host):
    """A page under another name that resolves to 127.0.0.1 gets nothing (DNS rebinding)."""
    for path in ("/", "/api/runs", "/info/", "/static/app.css", "/openapi.json"):
        assert client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:9999", "x"])
def test_other_pages_may_not_ask(client, origin):
    for method, path in (("GET", "/api/runs"), ("POST", "/api/runs/first/queue/look")):
        answer = client.request(method, path, headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_its_own_pages_may(client):
    headers = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert client.get("/api/runs", headers=headers).status_code == 200


def test_images_and_scripts_of_other_pages_are_not_fed(client):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/api/runs", headers=headers).status_code == 403
    headers["sec-fetch-mode"] = "navigate"  # a link to the page is fine
    assert client.get("/", headers=headers).status_code == 200


def test_what_the_browser_may_do(client):
    for path in ("/", "/api/runs", "/api/runs/nobody", "/static/main.js"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert client.get("/api/runs").headers["cache-control"] == "no-store"


# Tokens


def test_beyond_loopback_a_token_is_needed(guarded):
    client = guarded("http://10.0.0.5:8000", token=TOKEN, hosts=())
    for path in ("/", "/api/runs", "/info/", "/openapi.json", "/static/main.js"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert TOKEN not in answer.text
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/api/runs", headers=bearer).status_code == 200
    for wrong in (f"Bearer {TOKEN}x", "Bearer ", TOKEN, f"Basic {TOKEN}", "Bearer \xff"):
        assert (
            client.get("/api/runs", headers={"authorization": wrong.encode("latin-1")}).status_code
            == 401
        )


def test_the_printed_address_logs_in(guarded):
    client = guarded("http://10.0.0.5:8000", token=TOKEN, hosts=())
    assert address("10.0.0.5", 8000, TOKEN) == f"http://10.0.0.5:8000/?token={TOKEN}"
    assert client.get("/", params={"token": "wrong"}).status_code == 401
    answer = client.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Strict" in answer.headers["set-cookie"]
    assert client.get("/api/runs").status_code == 200  # the client keeps the cookie


def test_a_token_may_be_asked_for_on_loopback_too(guarded):
    client = guarded(token=TOKEN)
    assert client.get("/api/runs").status_code == 401
    assert client.get("/auth/").json() == {"enabled": True}
    assert client.post("/auth/token", data={"password": "no"}).status_code == 401
    given = client.post("/auth/token", data={"username": "me", "password": TOKEN}).json()
    bearer = {"authorization": f"Bearer {given['access_token']}"}
    assert client.get("/auth/token/valid", headers=bearer).status_code == 200


def test_without_a_token_there_is_no_login(client):
    assert client.get("/auth/").json() == {"enabled": False}


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("example.org", False),
    ],
)
def test_what_loopback_is(host, local):
    assert is_loopback(host) is local


def test_host_names():
    assert hostname("LocalHost:80") == "localhost"
    assert hostname("[::1]:80") == "::1"
    assert hostname("localhost.") == "localhost"
    assert hostname("[") == ""


# Bodies


def test_large_bodies_are_refused(guarded):
    client = guarded(limits=Limits(body_bytes=100_000))
    of = "/api/runs/first/scans"
    answer = client.post(of, files={"files": ("a.nii", b"0" * 200_000)})
    assert answer.status_code == 413
    assert "MiB in one request" in answer.json()["detail"]

    def pieces():
        yield b"--x\r\nContent-Disposition: form-data; name=files; filename=a.nii\r\n\r\n"
        for _ in range(40):
            yield b"0" * 10_000

    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(of, content=pieces(), headers=kind).status_code == 413


def run_guard(messages, *, body=b"", limits=None, headers=()):
    """What a guarded application that reads its body answers; `messages` come in turn."""
    sent = []
    queue = list(messages)

    async def receive():
        message = queue.pop(0)
        if message == "never":
            await asyncio.sleep(60)
        return message

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    made = Guard(app, token=None, hosts=(), limits=limits or Limits())
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": list(headers)}
    asyncio.run(made(scope, receive, send))
    return sent[0]["status"], made


def test_slow_bodies_are_given_up(monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT", 0.01)
    first = {"type": "http.request", "body": b"x", "more_body": True}
    status, made = run_guard([first, "never"], headers=[(b"content-length", b"1000000")])
    assert (status, made.uploads) == (408, 0)


def test_only_so_many_uploads_at_once():
    whole = {"type": "http.request", "body": b"x", "more_body": False}
    header = [(b"content-length", b"1000000")]
    status, made = run_guard([whole], headers=header, limits=Limits(uploads=0))
    assert (status, made.uploads) == (503, 0)
    status, made = run_guard([whole], headers=header, limits=Limits(uploads=1))
    assert (status, made.uploads) == (200, 0)
    status, _ = run_guard([whole], limits=Limits(uploads=0))  # small bodies are no uploads
    assert status == 200


def test_lengths_that_lie():
    more = {"type": "http.request", "body": b"x" * 200, "more_body": True}
    header = [(b"content-length", b"10")]
    status, _ = run_guard([more] * 4, headers=header, limits=Limits(body_bytes=500))
    assert status == 413
    header = [(b"content-length", b"9" * 30)]
    assert run_guard([more], headers=header)[0] == 413


@pytest.mark.parametrize(
    "others", ['prefs={"a":1}; ', "bad[1]=x; ", "user name=x; ", "flag; ", "é=1; ", ""]
)
def test_cookies_of_other_servers_of_the_host_do_no_harm(others):
    assert cookie_of(f"{others}vclipseg={TOKEN}") == TOKEN
    assert cookie_of(others) == ""
