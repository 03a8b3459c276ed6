"""Whether a tracking server answers at all, asked before a client is imported for it."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from pipeline.errors import UntaxedError


def reach(uri: str, seconds: float) -> None:
    """UntaxedError for a server that gives no answer; any answer is one, and what its certificate is
    worth is for the client to say."""
    parts = urlsplit(uri)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    try:
        urllib.request.urlopen(f"{place.geturl().rstrip('/')}/health", timeout=seconds).close()
    except (urllib.error.HTTPError, http.client.InvalidURL, ValueError):
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        if isinstance(reason, TimeoutError):
            raise UntaxedError(f"the server has not answered for {seconds:g} s") from error
        said = getattr(reason, "strerror", None) or str(reason)
        raise UntaxedError(f"the server does not answer: {said}") from error
