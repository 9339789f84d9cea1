"""helm test: every pod of every pool is scraped, and Ray Serve's metrics are among the answers."""

import os
import socket
import sys
import time
import urllib.request

WANTED = "ray_serve_application_status"


def scrape(address: str) -> str:
    """The metrics of one pod."""
    host = f"[{address}]" if ":" in address else address
    with urllib.request.urlopen(
        f"http://{host}:{os.environ['PORT']}/metrics", timeout=10
    ) as answer:
        return answer.read().decode()


def addresses(service: str) -> list[str]:
    """The pods behind a headless Service."""
    found = socket.getaddrinfo(service, None, proto=socket.IPPROTO_TCP)
    return sorted({row[4][0] for row in found})


def wrong(services: list[str]) -> list[str]:
    """What cannot be scraped, or says nothing of Serve."""
    faults, texts = [], []
    for service in services:
        try:
            for address in addresses(service):
                texts.append(scrape(address))
        except OSError as error:
            faults.append(f"{service}: {error}")
    if not faults and not any(WANTED in text for text in texts):
        faults.append(f"no node exports {WANTED}")
    return faults


def main() -> None:
    """Wait until all is scraped; exit with what is not."""
    services = os.environ["SERVICES"].split(",")
    deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
    while faults := wrong(services):
        if time.monotonic() > deadline:
            sys.exit("\n".join(faults))
        time.sleep(5)
    print(f"{', '.join(services)}: all are scraped")


if __name__ == "__main__":
    main()
