"""Where the settings of a run differ from those that are asked for."""

from collections.abc import Mapping
from typing import Any

_LISTED = 8
_ABSENT = object()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The differing settings by dotted name, at most eight."""
    old, new = _flat(there), _flat(here)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    shown = [f"{name} ({_shown(old, name)} there, {_shown(new, name)} here)" for name in names[:_LISTED]]
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join(shown + more)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return flat


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"
