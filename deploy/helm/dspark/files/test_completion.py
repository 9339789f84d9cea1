"""helm test: one greedy answer is the same over HTTP and gRPC, with speculation and without."""

import os
import sys
import time
from pathlib import Path

import grpc
import httpx

from dspark.pb import inference_pb2, inference_pb2_grpc

HOST, MODEL = os.environ["HOST"], os.environ["MODEL"]
PROMPT, MAX_TOKENS = os.environ["PROMPT"], int(os.environ["MAX_TOKENS"])
TIMEOUT_S = float(os.environ["TIMEOUT_S"])
CERTIFICATES = Path("/etc/dspark/test")


def key() -> str | None:
    """The key to show, if keys are asked for."""
    path = CERTIFICATES / "keys" / "key"
    return path.read_text().strip() if path.exists() else None


def await_health(url: str) -> None:
    """Until a request would be answered."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            answer = httpx.get(f"{url}/health", timeout=10, verify=False)
            if answer.status_code == 200:
                return
            reason = answer.text
        except httpx.HTTPError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            sys.exit(f"{url}/health: {reason}")
        time.sleep(2)


def by_http(url: str, speculate: bool) -> str:
    """The answer of /v1/chat/completions."""
    secret = key()
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "speculate": speculate,
        },
        headers={} if secret is None else {"Authorization": f"Bearer {secret}"},
        timeout=TIMEOUT_S,
        # The Service's name is in no public certificate; what is tested is the answer.
        verify=False,
    )
    if answer.status_code != 200:
        sys.exit(f"HTTP {answer.status_code}: {answer.text[:500]}")
    return answer.json()["choices"][0]["message"]["content"]


def channel() -> grpc.Channel:
    """To the public gRPC listener, as it is set up."""
    address = f"{HOST}:{os.environ['GRPC_PORT']}"
    if os.environ["GRPC_TLS"] != "true":
        return grpc.insecure_channel(address)
    server, client = CERTIFICATES / "grpc", CERTIFICATES / "client"
    authority = server / "ca.crt"
    trusted = authority if authority.exists() and authority.stat().st_size else server / "tls.crt"
    own = client.exists()
    credentials = grpc.ssl_channel_credentials(
        root_certificates=trusted.read_bytes(),
        private_key=(client / "tls.key").read_bytes() if own else None,
        certificate_chain=(client / "tls.crt").read_bytes() if own else None,
    )
    # It is dialled by the Service's name, and its certificate bears what clients dial.
    options = [("grpc.ssl_target_name_override", os.environ["GRPC_NAME"])]
    return grpc.secure_channel(address, credentials, options)


def by_grpc(stub: inference_pb2_grpc.InferenceStub, speculate: bool) -> tuple[str, int]:
    """The answer of Generate, and how many drafted tokens were accepted for it."""
    turn = inference_pb2.ChatMessage(role="user", content=PROMPT)
    request = inference_pb2.GenerateRequest(
        model=MODEL,
        chat=inference_pb2.ChatPrompt(messages=[turn]),
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        speculate=speculate,
    )
    secret = key()
    metadata = [] if secret is None else [("authorization", f"Bearer {secret}")]
    text, accepted = "", 0
    for part in stub.Generate(request, timeout=TIMEOUT_S, metadata=metadata):
        text += part.text
        accepted = part.speculation.accepted_tokens or accepted
    return text, accepted


def main() -> None:
    """Ask four times; exit with what differs."""
    url = f"{os.environ['HTTP_SCHEME']}://{HOST}:{os.environ['HTTP_PORT']}"
    await_health(url)
    answers = {
        "HTTP, with speculation": by_http(url, True),
        "HTTP, without": by_http(url, False),
    }
    with channel() as opened:
        stub = inference_pb2_grpc.InferenceStub(opened)
        answers["gRPC, with speculation"], accepted = by_grpc(stub, True)
        answers["gRPC, without"], unwanted = by_grpc(stub, False)
    for how, text in answers.items():
        print(f"{how}: {text!r}")
    if not all(answers.values()):
        sys.exit("an answer is empty")
    if unwanted:
        sys.exit(f"without speculation, {unwanted} drafted tokens were accepted")
    if len(set(answers.values())) > 1:
        sys.exit("the answers differ, and greedy ones must not")
    print(f"all the same; {accepted} drafted tokens were accepted")


if __name__ == "__main__":
    main()
