"""The commands ``service install`` and ``service uninstall``: the systemd unit of the machine or of the user.

Only files that sortd wrote, or that are as they were distributed, are replaced or removed.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from sortd.commands.console import printable
from sortd.config import config_file_of_user
from sortd.errors import ConfigError, StartupError
from sortd.files import read_regular, shipped, write_atomic

NAME = "sortd.service"
BOOTED = "/run/systemd/system"  # see sd_booted(3)
PACKAGED = ("/usr/lib/systemd/system", "/lib/systemd/system")
HIDDEN = ("/home", "/root", "/run/user")  # from the unit of the machine, see ProtectHome= in systemd.exec(5)
PROGRAM, PROGRAM_OF_USER = "/opt/sortd/.venv/bin/sortd", "%h/.local/bin/sortd"
CONFIG = Path("/etc/sortd/config.yaml")
CONFIG_TEXT = """\
# Written by `sortd service install`; `sortd config` prints every key with its default.
root: /srv/sortd
state_dir: /var/lib/sortd
cache_dir: /var/cache/sortd
"""
MARK = "# Written by `sortd service install`; put changes into a drop-in. Checksum of the rest: "
READABLE_BY_ALL = 0o644


@dataclass(frozen=True, slots=True)
class Unit:
    """A file that systemd reads: where it is, how it was distributed, and its content on this machine."""

    path: Path
    distributed: bytes
    content: bytes

    @property
    def written(self) -> bytes:
        """The content under a line with its checksum, which shows later whether somebody edited it."""
        return f"{MARK}{hashlib.sha256(self.content).hexdigest()}\n".encode() + self.content

    @property
    def is_edited(self) -> bool:
        """Whether something else stands there: a content that sortd wrote in no version, a link, a folder."""
        try:
            found = read_regular(self.path)
        except FileNotFoundError:
            return False
        except OSError:  # a link, for example of `systemctl mask`, or a folder
            return True
        first, _, rest = found.partition(b"\n")
        return found != self.distributed and first.decode(errors="replace") != MARK + hashlib.sha256(rest).hexdigest()


def install_service(*, is_of_user: bool, dry_run: bool) -> None:
    """Write the unit, enable it and start it, or print what would be done.

    Raises:
        ConfigError: systemd does not run, permissions or the configuration are missing, or a file was edited.
        StartupError: a command of systemd failed.
    """
    _require(is_of_user=is_of_user, dry_run=dry_run)
    units = [] if _is_packaged(is_of_user=is_of_user) else list(_units(is_of_user=is_of_user))
    for unit in units:
        if unit.is_edited:
            raise ConfigError(
                f"{unit.path} was not written by sortd, or was edited: move the changes into a drop-in "
                f"(systemctl {'--user ' * is_of_user}edit sortd), remove the file and repeat the command"
            )
    plan = {unit.path: unit.written for unit in units}
    if not is_of_user and not os.path.lexists(CONFIG):
        plan[CONFIG] = CONFIG_TEXT.encode()
    for path, content in plan.items():
        _say("write", os.fspath(path), dry_run=dry_run)
        if not dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content, mode=READABLE_BY_ALL)
    prepare = [["systemd-sysusers"], ["systemd-tmpfiles", "--create", "sortd.conf"]] if units and not is_of_user else []
    systemctl = _systemctl(is_of_user=is_of_user)
    for command in [*prepare, [*systemctl, "daemon-reload"], [*systemctl, "enable", "--now", "sortd"]]:
        _run(command, dry_run=dry_run)
    if not dry_run:
        typer.echo(f"sortd runs as a service: {shlex.join([*systemctl, 'status', 'sortd'])}")
        typer.echo("`loginctl enable-linger` keeps it running after logout." if is_of_user else f"It reads {CONFIG}.")


def uninstall_service(*, is_of_user: bool, dry_run: bool) -> None:
    """Stop and disable the unit, and remove what ``install_service`` wrote; raises as it does.

    The configuration, the journal, the images and the user stay; an edited file stays too, and is named.
    """
    _require(is_of_user=is_of_user, dry_run=dry_run, needs_config=False)
    systemctl, packaged = _systemctl(is_of_user=is_of_user), _is_packaged(is_of_user=is_of_user)
    found = [unit for unit in ([] if packaged else _units(is_of_user=is_of_user)) if os.path.lexists(unit.path)]
    if not packaged and not any(unit.path.name == NAME for unit in found):
        raise ConfigError("sortd is not installed as a service; there is nothing to remove")
    _run([*systemctl, "disable", "--now", "sortd"], dry_run=dry_run)
    for unit in found:
        if unit.is_edited:
            typer.echo(f"{printable(os.fspath(unit.path))} was edited and stays; remove it yourself")
            continue
        _say("remove", os.fspath(unit.path), dry_run=dry_run)
        if not dry_run:
            unit.path.unlink()
    _run([*systemctl, "daemon-reload"], dry_run=dry_run)


def _require(*, is_of_user: bool, dry_run: bool, needs_config: bool = True) -> None:
    """Raise ConfigError if systemd, permissions or the user's configuration are missing."""
    if not dry_run and (not os.path.isdir(BOOTED) or shutil.which("systemctl") is None):
        raise ConfigError(f"systemd does not run here ({BOOTED} is missing): have your service manager run `sortd run`")
    if is_of_user:
        file = config_file_of_user(os.environ)
        if needs_config and (file is None or not file.exists()):
            raise ConfigError(f"{file or '~/.config/sortd/config.yaml'} is missing: write it with `sortd init DIR`")
        return
    if os.geteuid() != 0 and not dry_run:
        raise ConfigError("only root can change the services of the machine: use sudo, or --user for your own")
    if needs_config and (hidden := next((place for place in _places() if place.startswith(HIDDEN)), None)):
        raise ConfigError(f"the unit hides {hidden}: move the installation out of {', '.join(HIDDEN)}, or use --user")


def _places() -> Iterator[str]:
    """Yield the folders from which the program runs."""
    yield sys.prefix + os.sep
    yield os.path.realpath(sys.executable)
    yield shipped("sortd")


def _is_packaged(*, is_of_user: bool) -> bool:
    """Tell whether a package of the distribution has installed the unit of the machine."""
    return not is_of_user and any(os.path.exists(os.path.join(folder, NAME)) for folder in PACKAGED)


def _units(*, is_of_user: bool) -> Iterator[Unit]:
    """Yield the files of the service with their contents for this machine."""
    if is_of_user:
        file = config_file_of_user(os.environ)
        if file is None:
            raise ConfigError("HOME is not set; the unit of a user is below it")
        yield _unit(file.parents[1] / "systemd" / "user" / NAME, f"systemd/user/{NAME}", PROGRAM_OF_USER)
        return
    yield _unit(Path("/etc/sysusers.d/sortd.conf"), "systemd/sysusers.d/sortd.conf")
    yield _unit(Path("/etc/tmpfiles.d/sortd.conf"), "systemd/tmpfiles.d/sortd.conf")
    yield _unit(Path("/etc/systemd/system") / NAME, f"systemd/{NAME}", PROGRAM)


def _unit(path: Path, name: str, program: str = "") -> Unit:
    distributed = read_regular(shipped(name))
    text = distributed.decode()
    if program and (own := _program()) != program:
        text = text.replace(program, own)
        text = text.replace("RequiresMountsFor=/opt/sortd ", f"RequiresMountsFor={_quoted(sys.prefix)} ")
        text = text.replace("Documentation=file:///opt/sortd/README.md\n", "Documentation=man:sortd(1)\n")
    return Unit(path, distributed, text.encode())


def _program() -> str:
    """Return how a unit calls this sortd."""
    beside = os.path.join(os.path.dirname(sys.executable), "sortd")
    return _quoted(beside) if os.access(beside, os.X_OK) else f"{_quoted(sys.executable)} -m sortd"


def _quoted(path: str) -> str:
    """Return a path as a word of a unit, see systemd.syntax(7)."""
    word = path.replace("%", "%%")
    return word if word.replace("/", "").replace(".", "").replace("-", "").replace("_", "").isalnum() else f'"{word}"'


def _systemctl(*, is_of_user: bool) -> list[str]:
    return ["systemctl", *(["--user"] if is_of_user else [])]


def _say(verb: str, what: str, *, dry_run: bool) -> None:
    typer.echo(f"{'would ' if dry_run else ''}{verb} {printable(what)}")


def _run(command: Sequence[str], *, dry_run: bool) -> None:
    """Print a command and, unless ``dry_run``, run it; raise StartupError if it fails."""
    _say("run", shlex.join(command), dry_run=dry_run)
    if dry_run:
        return
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- fixed words
    if done.returncode != 0:
        said = printable(" ".join(done.stderr.split())) or f"exit code {done.returncode}"
        raise StartupError(f"`{shlex.join(command)}` failed: {said}; see journalctl -u sortd")
