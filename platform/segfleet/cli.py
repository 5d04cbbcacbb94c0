"""What all jobs share: flags from a preset or a stored configuration, and errors without tracebacks."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from pspnet.errors import InputError
from segfleet.config import TrainingConfig
from segfleet.config_json import load_config, to_json, without_passwords
from segfleet.interruption import Terminated, terminable
from segfleet.lease import EXIT_CODE, HeldError
from segfleet.override import differences, override
from segfleet.search_config import SearchConfig

Settings = TypeVar("Settings")


def run_job(main: Callable[[], int | None], *, goes_on: bool = True) -> None:
    """Call `main` and exit: 0, its own code, or 2 with one plain message where a person's input cannot be used.

    4 where another process works on the same study or training; 130 where a person interrupted it, 143 at SIGTERM.
    `goes_on` says whether the same command takes up what is done already.
    """
    try:
        with terminable():
            code = main() or 0
        sys.exit(code)
    except HeldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (InputError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        again = "the same command goes on from here" if goes_on else "the same command begins anew"
        print(f"interrupted; {again}", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)


def parse_training(
    preset_of: Callable[[str], TrainingConfig],
    default_preset: str,
    arguments: Sequence[str] | None = None,
    *,
    description: str,
) -> TrainingConfig:
    """Return the configuration that `--preset` or `--config` and the flags ask for; `--print-config` exits 0."""
    return _parse(TrainingConfig, preset_of, default_preset, arguments, description)


def parse_search(
    preset_of: Callable[[str], SearchConfig],
    default_preset: str,
    arguments: Sequence[str] | None = None,
    *,
    description: str,
) -> SearchConfig:
    """As `parse_training`, for a search."""
    return _parse(SearchConfig, preset_of, default_preset, arguments, description)


def parse_options(
    kind: Callable[..., Settings], arguments: Sequence[str] | None = None, *, description: str
) -> Settings:
    """Return the options of a job that has no configuration: a dataclass filled from the flags."""
    return tyro.cli(kind, args=arguments, description=description, config=(tyro.conf.FlagConversionOff,))


Config = TypeVar("Config", TrainingConfig, SearchConfig)


def _parse(
    kind: type[Config],
    preset_of: Callable[[str], Config],
    default_preset: str,
    arguments: Sequence[str] | None,
    description: str,
) -> Config:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset = _taken(arguments, "--preset")
    config_path = _taken(arguments, "--config")
    print_config = "--print-config" in arguments
    if print_config:
        arguments.remove("--print-config")
    if preset and config_path:
        raise InputError("--preset and --config both give a whole configuration. Give one of them.")
    base = load_config(kind, config_path) if config_path else preset_of(preset or default_preset)
    description += (
        "\n\nThree flags come before all others: --preset NAME starts from a named configuration "
        f"(default: {default_preset}), --config FILE from a stored one (config.json of a run), and "
        "--print-config shows the resolved configuration as JSON and stops."
    )
    parsed = tyro.cli(
        kind,
        args=arguments,
        default=base,
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    config = override(base, differences(base, parsed))
    if print_config:
        print(to_json(without_passwords(config)), end="")
        sys.exit(0)
    return config


def _taken(arguments: list[str], flag: str) -> str:
    """Remove `flag` and its value from `arguments` and return the value, or "" where the flag is not given."""
    for index, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            del arguments[index]
            return argument.split("=", 1)[1]
        if argument == flag:
            if index + 1 == len(arguments):
                raise InputError(f"{flag} must be followed by a value, but it is the last argument.")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
    return ""
