"""Passwords: in the environment and in addresses, and in nothing that is stored, shown or kept by a server.

Ray keeps the settings and the environment of every run and actor in its records. What is secret goes to the workers
beside them, as a part of the function that they run.
"""

import os
import re
from collections.abc import Mapping

from pspnet.errors import InputError

MASK = "***"
URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_SECRET_NAME = re.compile(r"PASSW|TOKEN|SECRET|CREDENTIAL|(^|_)KEY($|_)", re.IGNORECASE)
_USER = re.compile(r"(://[^/@:?#]*):(?!\d+(?:[/?#\s]|$))\S*@")
_QUERY = re.compile(r"([?&;][^=&;#]*(?:passw|pwd|token|secret|key)[^=&;#]*)=[^&;#\s]*", re.IGNORECASE)


def masked(uri: str) -> str:
    """Return an address, or a text with some, without the passwords before hosts or among the options."""
    return _QUERY.sub(rf"\1={MASK}", _USER.sub(rf"\1:{MASK}@", uri))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without passwords, shortened to what a terminal shows."""
    text = masked(str(error)).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= 300 else line[:297] + "…"


def unmasked(uri: str, setting: str) -> str:
    """Return an address with its password: one that was stored without takes the environment's, where it has it.

    Raises InputError, which names `setting`, where the password is not known here.
    """
    if MASK not in uri:
        return uri
    for name in URI_VARIABLES:
        known = os.environ.get(name, "")
        if masked(known) == uri:
            return known
    raise InputError(
        f"{setting} must have its password, but got {uri}: passwords are stored nowhere. Give the whole address, or "
        f"set {URI_VARIABLES[0]} to it."
    )


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable must not be in a record: by its name, or as an address with a password."""
    return _SECRET_NAME.search(name) is not None or masked(value) != value


def secrets_of(environment: Mapping[str, str], tracking_uri: str = "") -> dict[str, str]:
    """Return the variables of MLflow and segfleet that are secret, and `tracking_uri` where it has a password."""
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(("MLFLOW_", "SEGFLEET_")) and is_secret(name, value)
    }
    return found | ({URI_VARIABLES[0]: tracking_uri} if masked(tracking_uri) != tracking_uri else {})
