"""`dspark chat`: talk to a running service."""

from __future__ import annotations

import typer
from rich.text import Text

from dspark.cli.connection import TLS_CA, TLS_CERT, TLS_KEY, TLS_NAME, connect
from dspark.cli.console import err, out, reported_errors

_DRAFTED = "bold green"


def chat(
    message: str = typer.Argument("", help="Ask this and end; without it, a conversation starts."),
    address: str = typer.Option("127.0.0.1:50051", help="host:port of the gateway's gRPC server."),
    model: str = typer.Option("", help="Model to ask; default: the first one served."),
    max_tokens: int = typer.Option(512, min=1, help="Tokens an answer, at most."),
    temperature: float = typer.Option(0.7, help="0 is greedy."),
    seed: int | None = typer.Option(None, min=0, help="Names the random numbers."),
    show_drafts: bool = typer.Option(
        False, "--show-drafts", help="Accepted draft tokens stand out in green."
    ),
    no_speculation: bool = typer.Option(False, help="Ask for plain decoding."),
    tls_ca: str = TLS_CA,
    tls_cert: str = TLS_CERT,
    tls_key: str = TLS_KEY,
    tls_name: str = TLS_NAME,
) -> None:
    """Chat in the terminal; answers stream as they are committed. An empty line ends it.

    An API key is taken from $DSPARK_API_KEY.
    """
    with reported_errors():
        from dspark.errors import UnavailableError
        from dspark.rpc.client import chat_request

        with connect(address, tls_ca, tls_cert, tls_key, tls_name) as client:
            models = client.models()
            if not models:
                raise UnavailableError(f"{address} serves no model yet; try again shortly")
            name = model or models[0].id
            turns: list[tuple[str, str]] = []
            while True:
                text = message or out.input("[bold cyan]you ›[/] ").strip()
                if not text:
                    return
                turns.append(("user", text))
                request = chat_request(
                    name,
                    turns,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed,
                    speculate=not no_speculation,
                )
                answer = ""
                for part in client.generate(request):
                    for span in part.spans:
                        style = _DRAFTED if show_drafts and span.drafted else ""
                        out.print(Text(span.text, style), end="", soft_wrap=True)
                    answer += part.text
                out.print()
                turns.append(("assistant", answer))
                stats, usage = part.speculation, part.usage
                steps = max(1, stats.steps - 1)
                err.print(
                    f"[dim]{usage.completion_tokens} tokens, {stats.accepted_tokens} of "
                    f"{stats.drafted_tokens} drafted accepted, accepted length "
                    f"{(usage.completion_tokens - 1) / steps:.2f}[/]",
                    highlight=False,
                )
                if message:
                    return
