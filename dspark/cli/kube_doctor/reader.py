"""The Kubernetes API, as far as doctor reads it: single objects, lists, and what one may do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import urlencode

import urllib3
from kubernetes import client

from dspark.cli.kube_doctor.objects import Denied, Listing, Raw, Single, items, printable, text
from dspark.errors import UnavailableError

_PAGE = 500  # objects
_MOST_PAGES = 40
_TIMEOUT_S = 15.0


class _RefusedError(Exception):
    """The API answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Reader:
    """One API server. UnavailableError if it cannot be talked to at all."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    def get(self, path: str, what: str) -> Single:
        """One object; None where there is none."""
        try:
            return self._ask("GET", path)
        except _RefusedError as error:
            return None if error.status == 404 else Denied(what, _reason(error))

    def list(self, path: str, what: str, **query: str) -> Listing:
        """All of a kind; none where the kind is not served."""
        found: list[Raw] = []
        token = ""
        for _ in range(_MOST_PAGES):
            more = {"continue": token} if token else {}
            try:
                page = self._ask("GET", path, {"limit": str(_PAGE), **query, **more})
            except _RefusedError as error:
                return () if error.status == 404 else Denied(what, _reason(error))
            found += items(page, "items")
            token = text(page, "metadata", "continue")
            if not token:
                return tuple(found)
        return Denied(what, f"there are more than {_PAGE * _MOST_PAGES}")

    def may(self, verb: str, group: str, resource: str, namespace: str) -> bool | Denied:
        """Whether whoever asks may do so there."""
        attributes = {
            "verb": verb,
            "group": group,
            "resource": resource,
            "namespace": namespace,
        }
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        try:
            review = self._ask("POST", path, body=body)
        except _RefusedError as error:
            return Denied("selfsubjectaccessreviews", _reason(error))
        return text(review, "status", "allowed") == "True"

    def _ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None
    ) -> Raw:
        settings = self._api.configuration
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if bearer := settings.auth_settings().get("BearerToken"):
            headers["Authorization"] = bearer["value"]
        target = settings.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            # The generated calls differ between versions of the client; its connections do not.
            answer = self._api.rest_client.pool_manager.request(
                method,
                target,
                headers=headers,
                body=None if body is None else json.dumps(body),
                timeout=_TIMEOUT_S,
                retries=False,
            )
            raw = json.loads(answer.data) if answer.data else {}
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise UnavailableError(
                f"the Kubernetes API at {settings.host} does not answer as one: {error}; look at "
                "the kubeconfig's server and at the network between"
            ) from error
        if answer.status == 401:
            raise UnavailableError(
                f"the Kubernetes API at {settings.host} does not know who asks (401): the "
                "kubeconfig's credentials have expired or are wrong"
            )
        if answer.status >= 400:
            raise _RefusedError(answer.status, printable(text(raw, "message")))
        return raw if isinstance(raw, dict) else {}


def _reason(error: _RefusedError) -> str:
    if error.status == 403:
        return "forbidden (403)"
    return f"the API answered {error.status}: {error}"
