"""helm test: every application of the RayService runs, and every deployment in it is healthy."""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def rayservice() -> dict:
    """The RayService, from the Kubernetes API."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    with open(f"{ACCOUNT}/token") as file:
        token = file.read()
    request = urllib.request.Request(
        f"https://{host}:{port}/apis/ray.io/v1/namespaces/{os.environ['NAMESPACE']}"
        f"/rayservices/{os.environ['RAYSERVICE']}",
        headers={"Authorization": f"Bearer {token}"},
    )
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return json.load(answer)


def wrong(service: dict, roles: list[str]) -> list[str]:
    """What is not as it should be."""
    active = service.get("status", {}).get("activeServiceStatus", {})
    found = active.get("applicationStatuses") or {}
    faults = []
    for role in roles:
        application = found.get(role)
        if application is None:
            faults.append(f"{role}: there is no such application yet")
            continue
        if application.get("status") != "RUNNING":
            faults.append(f"{role}: {application.get('status')}: {application.get('message', '')}")
        deployments = application.get("serveDeploymentStatuses") or {}
        for name, deployment in deployments.items():
            if deployment.get("status") != "HEALTHY":
                faults.append(
                    f"{role}: deployment {name} is {deployment.get('status')}: "
                    f"{deployment.get('message', '')}"
                )
    return faults


def main() -> None:
    """Wait until all is well; exit with what is not."""
    roles = os.environ["ROLES"].split(",")
    deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
    while True:
        try:
            faults = wrong(rayservice(), roles)
        except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
            faults = [f"the Kubernetes API: {error}"]
        if not faults:
            print(f"{', '.join(roles)}: all run and are healthy")
            return
        if time.monotonic() > deadline:
            sys.exit("\n".join(faults))
        time.sleep(5)


if __name__ == "__main__":
    main()
