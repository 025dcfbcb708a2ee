"""The units, as systemd itself reads and runs them: in a private systemd where namespaces are allowed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import sortd
from tests.daemon_process import PATIENCE_SECONDS, make_dataset, picture

REPOSITORY = Path(__file__).parents[1]
UNITS = REPOSITORY / "systemd"
PATIENCE = PATIENCE_SECONDS

DOCUMENT = (REPOSITORY / "docs" / "service.md").read_text(encoding="utf-8")


def documented(kind: str, heading: str) -> str:
    """Return the block of this kind that stands below a heading of docs/service.md."""
    [block] = re.findall(rf"```{kind}\n(.*?)```", DOCUMENT.split(f"## {heading}\n")[1].split("\n## ")[0], re.DOTALL)
    return str(block)


CONFIG = """\
model: /opt/sortd/model
mode: max
abstain: off
settle_seconds: 0.5
"""


def verify(unit: Path, program: str, *manager: str, runtime: Path) -> str:
    """Return what systemd-analyze says of a unit, whose program is replaced by one that is here."""
    copy = runtime / unit.name
    copy.write_text(unit.read_text().replace(program, shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", *manager, "verify", os.fspath(copy)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": os.fspath(runtime)},
    )
    return done.stdout + done.stderr


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_machines_unit(tmp_path: Path) -> None:
    """An unknown key is only a line of text and exit code 0: there must be no text."""
    assert verify(UNITS / "sortd.service", "/opt/sortd/.venv/bin/sortd", runtime=tmp_path) == ""


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_users_unit(tmp_path: Path) -> None:
    """The same for the unit that a user's manager runs."""
    assert verify(UNITS / "user" / "sortd.service", "%h/.local/bin/sortd", "--user", runtime=tmp_path) == ""


@needs_systemd
@pytest.mark.parametrize("manager", ["--system", "--user"])
@pytest.mark.parametrize("name", ["sortd-review", "sortd-encode"])
def test_systemd_has_nothing_to_say_about_the_units_with_sockets(tmp_path: Path, manager: str, name: str) -> None:
    """The same for a service and its socket, each of which names the other."""
    folder, program = (
        (UNITS, "/opt/sortd/.venv/bin/sortd") if manager == "--system" else (UNITS / "user", "%h/.local/bin/sortd")
    )
    shutil.copy(folder / f"{name}.socket", tmp_path)
    assert verify(folder / f"{name}.service", program, manager, runtime=tmp_path) == ""
    assert verify(folder / f"{name}.socket", program, manager, runtime=tmp_path) == ""


@needs_systemd
def test_an_unknown_key_would_be_told(tmp_path: Path) -> None:
    """The two tests above can fail."""
    (tmp_path / "unit").mkdir()
    broken = tmp_path / "unit" / "sortd.service"
    broken.write_text((UNITS / "sortd.service").read_text().replace("ProtectClock=", "ProtectClocks="))
    assert "ProtectClocks" in verify(broken, "/opt/sortd/.venv/bin/sortd", runtime=tmp_path)


def test_what_is_known_to_break_sortd_is_not_in_the_units() -> None:
    """Each was seen in a run: torch dies or halves its threads, renames become copies, systemd 252 complains."""
    folders, names = (UNITS, UNITS / "user"), ("sortd.service", "sortd-encode.service")
    for unit in (folder / name for folder in folders for name in names):
        lines = [line for line in unit.read_text().splitlines() if line and not line.startswith("#")]
        assert not [line for line in lines if line.startswith("MemoryDenyWriteExecute=")]
        assert not [line for line in lines if line.startswith("SystemCallFilter=~") and "@resources" in line]
        assert len([line for line in lines if line.startswith("ReadWritePaths=")]) <= 1
        assert "Type=notify" in lines


# ---------------------------------------------------------------- a private systemd


@dataclass(frozen=True)
class Lab:
    """A private systemd, and the folder that is /srv/sortd inside."""

    scratch: Path
    srv: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root."""
        done = subprocess.run(
            [os.fspath(REPOSITORY / "tests" / "systemd_lab"), "run", os.fspath(self.scratch), *command],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=PATIENCE,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def property(self, name: str, unit: str = "sortd") -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).stdout.strip()

    def lines(self, *match: str) -> list[dict[str, Any]]:
        """Return the log lines of a unit, with the journal's own facts."""
        output = self.run("journalctl", "--output=json", "--no-pager", *(match or ("--unit=sortd",))).stdout
        entries = [json.loads(line) for line in output.splitlines()]
        return [
            json.loads(entry["MESSAGE"]) | {"PRIORITY": entry["PRIORITY"]}
            for entry in entries
            if str(entry["MESSAGE"]).startswith("{")
        ]

    def wait(self, claim: Callable[[], object], what: str, *match: str) -> None:
        """Wait until a claim holds."""
        deadline = time.monotonic() + PATIENCE
        while not claim():
            if time.monotonic() > deadline:
                journal = self.run("journalctl", "--no-pager", "--lines=40", *match, check=False).stdout
                raise AssertionError(f"{what} did not come:\n{journal}")
            time.sleep(0.2)

    def wait_for(self, event: str, count: int = 1, match: Sequence[str] = (), **fields: object) -> dict[str, Any]:
        """Wait for the line of an event, and return the last."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines(*match) if {"event": event, **fields}.items() <= line.items()]

        self.wait(lambda: len(found()) >= count, f"{count} x {event} {fields}", *match)
        return found()[-1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Lab]:
    """A private systemd with sortd where the unit expects it, and a user in its group."""
    scratch, srv = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("srv")
    program = REPOSITORY / "tests" / "systemd_lab"
    interpreter = Path(os.path.realpath(sys.executable))
    prefix = interpreter.parents[1]  # bound to /opt, since ProtectHome= hides what lies in /root or /home
    lib = f"/opt/sortd/.venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    binds = [
        f"{prefix}:/opt/python:ro",
        f"{sysconfig.get_path('purelib')}:{lib}:ro",
        f"{REPOSITORY}:/opt/sortd/src:ro",
        f"{tiny_clip}:/opt/sortd/built:ro",
        f"{srv}:/srv/sortd",
    ]
    boot = subprocess.run([program, "boot", scratch, *binds], capture_output=True, text=True, check=False)
    if boot.returncode == 77:
        pytest.skip(boot.stderr.strip())
    assert boot.returncode == 0, boot.stderr
    lab = Lab(scratch, srv)
    try:
        install(lab, interpreter.name)
        yield lab
    finally:
        subprocess.run([program, "stop", scratch], check=True)


def install(lab: Lab, interpreter: str) -> None:
    """Put the program in its place, then do what docs/service.md says."""
    run = "import sys; sys.path.insert(0, '/opt/sortd/src'); sys.argv[0] = 'sortd'; "
    lab.run(
        "sh",
        "-ec",
        f"""
        mkdir -p /opt/sortd/.venv/bin
        echo /opt/python/lib > /etc/ld.so.conf.d/00-python.conf && ldconfig  # its own libpython, where it has one
        ln -s /opt/python/bin/{interpreter} /opt/sortd/.venv/bin/python
        printf 'home = /opt/python/bin\n' > /opt/sortd/.venv/pyvenv.cfg
        cat > /opt/sortd/.venv/bin/sortd <<'.'
#!/opt/sortd/.venv/bin/python
{run}from sortd.cli import main; main()
.
        cat > /opt/sortd/.venv/bin/fast-sortd <<'.'
#!/opt/sortd/.venv/bin/python
{run}from tests.fast_sortd import main; main()
.
        chmod 755 /opt/sortd/.venv/bin/*sortd
        cp -r /opt/sortd/built /opt/sortd/model
        chmod -R a+rX /opt/sortd/model  # safetensors writes for its owner alone
        """,
    )
    install_commands = documented("sh", "For a machine").replace("sudo ", "")
    lab.run("sh", "-ec", f"cd /opt/sortd/src\n{install_commands}")
    lab.run("sh", "-ec", f"cat > /etc/sortd/config.yaml <<'.'\n{documented('yaml', 'For a machine')}{CONFIG}.\n")
    lab.run("useradd", "--create-home", "--groups", "sortd", "--shell", "/bin/sh", "alice")


@pytest.fixture(scope="module")
def service(lab: Lab) -> Lab:
    """The machine's unit, started on a dataset that alice has taught."""
    make_dataset(lab.srv)
    lab.run("sh", "-ec", "chown -R alice:sortd /srv/sortd/Colours && chmod -R g+rwX /srv/sortd/Colours")
    lab.run("sh", "-ec", "find /srv/sortd/Colours -type d -exec chmod g+s {} +")
    started = lab.run("systemctl", "start", "sortd", check=False)
    assert started.returncode == 0, lab.run("journalctl", "--no-pager", "--lines=40").stdout
    return lab


def drop(lab: Lab, name: str, colour: str) -> int:
    """Let alice move an image in, and return its inode."""
    staged = lab.srv / f".{name}"
    picture(colour, sum(name.encode())).save(staged, format="PNG")
    lab.run("chown", "alice:alice", f"/srv/sortd/.{name}")
    inode = staged.stat().st_ino
    lab.run("runuser", "-u", "alice", "--", "mv", f"/srv/sortd/.{name}", f"/srv/sortd/Colours/Images/{name}")
    return inode


def filed(lab: Lab, name: str, colour: str) -> Path:
    """Wait until a file is filed, and return it."""
    path = lab.srv / "Colours" / "Dataset" / colour / name
    lab.wait(path.exists, os.fspath(path), "--unit=sortd")
    return path


def test_the_unit_is_clean_where_it_is_installed(lab: Lab) -> None:
    """Nothing was replaced here: the very file, with the program where it says."""
    done = lab.run("systemd-analyze", "verify", "/etc/systemd/system/sortd.service")
    assert done.stdout + done.stderr == ""


def test_a_dropped_file_is_filed_and_is_the_same_inode(service: Lab) -> None:
    """Another user's file is moved within the sandbox by a rename, not copied, and said in one line of JSON."""
    inode = drop(service, "first.png", "red")
    path = filed(service, "first.png", "red")
    assert path.stat().st_ino == inode
    line = service.wait_for("image.filed", label="red")
    assert line["path"].endswith("/Images/first.png")
    assert line["PRIORITY"] == "6"
    assert service.property("ActiveState") == "active"


def test_the_command_line_sees_the_service(service: Lab) -> None:
    """Status and check, as the service's user, find what the service uses; Prometheus' collector may read its file."""
    sortd = ("runuser", "-u", "sortd", "--", "/opt/sortd/.venv/bin/sortd")
    status = json.loads(service.run(*sortd, "status", "--json", "-c", "/etc/sortd/config.yaml").stdout)
    assert str(status["pid"]) == service.property("MainPID")
    service.run(*sortd, "check", "-c", "/etc/sortd/config.yaml")
    service.wait(
        lambda: "sortd_images_total" in service.run("cat", "/run/sortd/sortd.prom", check=False).stdout, "sortd.prom"
    )
    service.run("runuser", "-u", "nobody", "--", "cat", "/run/sortd/sortd.prom")


def test_the_service_is_confined(service: Lab) -> None:
    """Its own user, no capability, no new privilege, a filter of system calls, and nothing to write but its folders."""
    process = service.property("MainPID")
    status = dict(re.findall(r"^(\w+):\s*(.*)$", service.run("cat", f"/proc/{process}/status").stdout, re.MULTILINE))
    assert status["Uid"].split()[0] == service.run("id", "-u", "sortd").stdout.strip()
    assert (status["CapEff"], status["CapBnd"]) == ("0" * 16, "0" * 16)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = ("nsenter", "--target", process, "--mount", "sh", "-c")
    for path in ("/etc/x", "/opt/x", "/usr/x", "/var/lib/x"):
        assert "Read-only" in service.run(*inside, f"touch {path}", check=False).stderr
    for path in ("/srv/sortd/.x", "/var/lib/sortd/x", "/var/cache/sortd/x", "/run/sortd/x"):
        service.run(*inside, f"touch {path} && rm {path}")


REVIEW_SOCKET = "/run/sortd-review/review.sock"


def fetch(lab: Lab, user: str, path: str, *options: str) -> str:
    """Return what a user gets from the review page: its status, and then headers and body."""
    curl = ("curl", "--silent", "--include", "--max-time", "60", "--unix-socket", REVIEW_SOCKET, *options)
    done = lab.run("runuser", "-u", user, "--", *curl, f"http://localhost:8337{path}", check=False)
    return done.stdout or f"curl: {done.returncode}"


@pytest.fixture(scope="module")
def review(service: Lab) -> Lab:
    """The socket of the review page, set up by the commands of docs/service.md."""
    commands = documented("sh", "The review page").replace("sudo ", "")
    service.run("sh", "-ec", f"cd /opt/sortd/src\n{commands}")
    return service


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_review_page_is_for_the_group_and_needs_the_token(review: Lab) -> None:
    """The first connection starts it; alice, who is in the group, sees nothing until she has the address."""
    assert fetch(review, "nobody", "/").startswith("curl: 7")
    first = fetch(review, "alice", "/")
    assert first.startswith("HTTP/1.1 403 "), review.run("journalctl", "--no-pager", "--unit=sortd-review").stdout
    assert review.property("ActiveState", "sortd-review") == "active"
    assert review.run("runuser", "-u", "alice", "--", "cat", "/var/lib/sortd/review.url", check=False).returncode != 0
    url = review.run("runuser", "-u", "sortd", "--", "cat", "/var/lib/sortd/review.url").stdout.strip()
    address, token = url.rsplit("/", 1)
    assert address == "http://127.0.0.1:8337/enter"
    entered = fetch(review, "alice", f"/enter/{token}")
    assert entered.startswith("HTTP/1.1 303 ")
    cookie = re.findall(r"set-cookie: ([^;]+);", entered, re.IGNORECASE)[0]
    assert not fetch(review, "alice", "/", "--cookie", cookie).startswith("HTTP/1.1 403 ")
    journal = review.run("journalctl", "--no-pager", "--unit=sortd-review", "--output=cat").stdout
    assert "review.ready" in journal
    assert token not in journal


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_review_page_is_confined(review: Lab) -> None:
    """No network, no capability, images that it can only read; and yet it can ask the daemon."""
    fetch(review, "alice", "/")
    process = review.property("MainPID", "sortd-review")
    status = dict(re.findall(r"^(\w+):\s*(.*)$", review.run("cat", f"/proc/{process}/status").stdout, re.MULTILINE))
    assert status["Uid"].split()[0] == review.run("id", "-u", "sortd").stdout.strip()
    assert (status["CapEff"], status["CapBnd"]) == ("0" * 16, "0" * 16)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = ("nsenter", "--target", process, "--mount", "--net")
    links = review.run(*inside, "cat", "/proc/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]
    for path in ("/etc/x", "/opt/x", "/usr/x", "/srv/sortd/x", "/srv/sortd/Colours/Images/x"):
        assert "Read-only" in review.run(*inside, "touch", path, check=False).stderr
    for path in ("/var/lib/sortd/x", "/var/cache/sortd/x"):
        review.run(*inside, "sh", "-c", f"touch {path} && rm {path}")
    sortd = ("runuser", "-u", "sortd", "--", "/opt/sortd/.venv/bin/sortd")
    review.run(*inside, *sortd, "rebuild", "-c", "/etc/sortd/config.yaml")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_review_page_stops_and_starts_again_by_a_connection(review: Lab) -> None:
    """The socket outlives the service; the next start has another token."""
    fetch(review, "alice", "/")
    before = review.run("cat", "/var/lib/sortd/review.url").stdout
    review.run("systemctl", "stop", "sortd-review.service")
    assert review.property("Result", "sortd-review") == "success"
    assert review.run("test", "-e", "/var/lib/sortd/review.url", check=False).returncode == 1
    assert fetch(review, "alice", "/").startswith("HTTP/1.1 403 ")
    assert review.run("cat", "/var/lib/sortd/review.url").stdout != before
    review.run("systemctl", "stop", "sortd-review.socket", "sortd-review.service")
    assert review.run("test", "-e", REVIEW_SOCKET, check=False).returncode == 1


ENCODED = (("blue", "encoded"), ("green", "again"))
ENCODER_SOCKET = "/run/sortd-encode/encoder.sock"


def test_the_encoder_service_is_started_by_its_client(service: Lab) -> None:
    """A daemon with its socket as backend waits for it, uses it, and outlives its death; only the user may connect."""
    commands = documented("sh", "One model for several services").replace("sudo ", "")
    service.run("sh", "-ec", f"cd /opt/sortd/src\n{commands}")
    keys = documented("yaml", "One model for several services")
    keys = keys.replace("model: auto", "model: /opt/sortd/model")
    service.run("sh", "-ec", f"cat > /etc/sortd/encoder.yaml <<'.'\n{keys}.\n")
    assert service.run("stat", "--format=%a %U", ENCODER_SOCKET).stdout.split() == ["600", "sortd"]
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect('{ENCODER_SOCKET}')"
    python = ("/opt/sortd/.venv/bin/python", "-c", connect)
    assert "PermissionError" in service.run("runuser", "-u", "nobody", "--", *python, check=False).stderr
    service.run("sh", "-ec", f"echo 'backend: socket:{ENCODER_SOCKET}' >> /etc/sortd/config.yaml")
    try:
        service.run("systemctl", "restart", "sortd")
        assert service.property("ActiveState", "sortd-encode") == "active"
        drop(service, "encoded.png", "blue")
        filed(service, "encoded.png", "blue")
        before = service.property("MainPID", "sortd-encode")
        service.run("kill", "-9", before)
        drop(service, "again.png", "green")
        filed(service, "again.png", "green")
        after = service.property("MainPID", "sortd-encode")
        assert after not in {"0", before}
        status = dict(re.findall(r"^(\w+):\s*(.*)$", service.run("cat", f"/proc/{after}/status").stdout, re.MULTILINE))
        assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
        inside = ("nsenter", "--target", after, "--mount", "sh", "-c")
        assert service.run(*inside, "ls -A /srv/sortd", check=False).stdout == ""
        service.wait(
            lambda: (
                "sortd_encoder_encoded_total"
                in service.run("cat", "/run/sortd-encode/sortd-encode.prom", check=False).stdout
            ),
            "sortd-encode.prom",
        )
    finally:
        service.run("sed", "-i", "/^backend:/d", "/etc/sortd/config.yaml")
        service.run("systemctl", "stop", "sortd-encode.socket", "sortd-encode.service")
        service.run("systemctl", "restart", "sortd")
    assert service.property("Result", "sortd-encode") == "success"
    images = [service.srv / "Colours" / "Dataset" / colour / f"{name}.png" for colour, name in ENCODED]
    for image in images:
        image.unlink()


def reload(service: Lab) -> None:
    """Reload, and wait until it is over: meanwhile systemd takes no other."""
    service.run("systemctl", "reload", "sortd")
    service.wait(lambda: service.property("ActiveState") == "active", "active again")


def test_a_reload_is_taken_and_a_bad_one_refused(service: Lab) -> None:
    """`systemctl reload` swaps the configuration; a broken file keeps the one before, and the service stays up."""
    process = service.property("MainPID")
    service.run("sed", "-i", "s/settle_seconds: .*/settle_seconds: 0.6/", "/etc/sortd/config.yaml")
    reload(service)
    service.wait_for("config.reloaded")
    service.run("sed", "-i", "s/settle_seconds: .*/settle_seconds: soon/", "/etc/sortd/config.yaml")
    reload(service)
    assert service.wait_for("config.refused")["PRIORITY"] == "3"
    service.run("sed", "-i", "s/settle_seconds: .*/settle_seconds: 0.5/", "/etc/sortd/config.yaml")
    reload(service)
    service.wait_for("config.reloaded", count=2)
    assert service.property("MainPID") == process


def test_a_hook_works_in_the_sandbox(service: Lab) -> None:
    """It is started without a drop-in, writes into the state folder, and is told of a missing disk."""
    hook = 'hooks: [{command: [sh, -c, "cat >> /var/lib/sortd/heard"]}]'
    service.run("sh", "-c", f"echo '{hook}' >> /etc/sortd/config.yaml")
    reload(service)
    try:
        marker = service.srv / "Colours" / ".sortd"
        marker.rename(service.srv / "aside")
        service.run("touch", "/srv/sortd/Colours/Clases/red/0.png")  # sortd looks at the dataset again
        service.wait(
            lambda: "disk_missing" in service.run("cat", "/var/lib/sortd/heard", check=False).stdout, "the hook"
        )
        (service.srv / "aside").rename(marker)
        service.run("touch", "/srv/sortd/Colours/Clases/red/0.png")
    finally:
        service.run("sed", "-i", "/^hooks:/d", "/etc/sortd/config.yaml")
        reload(service)


def test_a_stop_is_quick_and_clean(service: Lab) -> None:
    """SIGTERM ends it with success, before systemd's patience is over: nothing is killed, no process stays."""
    service.run("systemctl", "stop", "sortd")
    service.wait_for("daemon.stopped")
    assert service.property("Result") == "success"
    assert service.property("ExecMainStatus") == "0"
    tree = {os.path.relpath(path, service.srv / "Colours" / "Dataset") for path in service.srv.rglob("Dataset/*/*.png")}
    assert tree == {"red/first.png"}
    assert list((service.srv / "Colours" / "Images").iterdir()) == []


def test_a_configuration_that_is_wrong_is_not_started_again_and_again(service: Lab) -> None:
    """Exit code 78 says that the operator must act: one start, one sentence."""
    service.run("systemctl", "stop", "sortd")
    service.run("sh", "-ec", "echo 'colour: blue' >> /etc/sortd/config.yaml")
    assert service.run("systemctl", "start", "sortd", check=False).returncode != 0
    assert service.property("ExecMainStatus") == "78"
    assert service.property("ActiveState") == "failed"
    assert "colour" in service.run("journalctl", "--unit=sortd", "--no-pager", "--lines=5").stdout
    service.run("sed", "-i", "/^colour:/d", "/etc/sortd/config.yaml")
    service.run("systemctl", "reset-failed", "sortd")


@pytest.fixture(scope="module")
def fast(service: Lab) -> Lab:
    """The service anew, with the encoder of the tests, which loads at once, and with short times."""
    service.run(
        "sh",
        "-ec",
        """
        mkdir -p /run/systemd/system/sortd.service.d
        cat > /run/systemd/system/sortd.service.d/test.conf <<'.'
[Service]
WatchdogSec=5
RestartSec=1
ExecStart=
ExecStart=/opt/sortd/.venv/bin/fast-sortd run -c /etc/sortd/config.yaml
.
        systemctl daemon-reload
        systemctl restart sortd
        """,
    )
    return service


def test_a_killed_service_comes_back_and_files_what_came_meanwhile(fast: Lab) -> None:
    """Kill -9 loses nothing: systemd starts it again, and what was dropped before it was up is filed."""
    process, restarts = fast.property("MainPID"), int(fast.property("NRestarts"))
    fast.run("kill", "-9", process)
    inode = drop(fast, "second.png", "blue")
    assert filed(fast, "second.png", "blue").stat().st_ino == inode
    fast.wait(lambda: fast.property("ActiveState") == "active", "active again")
    assert fast.property("MainPID") != process
    assert int(fast.property("NRestarts")) > restarts


def test_a_hung_service_is_noticed_and_started_again(fast: Lab) -> None:
    """A process that is there and does nothing feeds no watchdog: systemd ends it and begins anew."""
    process, restarts = fast.property("MainPID"), int(fast.property("NRestarts"))
    fast.run("kill", "-STOP", process)
    fast.wait(lambda: int(fast.property("NRestarts")) > restarts, "a restart")
    fast.wait(lambda: fast.property("ActiveState") == "active", "active again")
    assert fast.property("MainPID") != process
    inode = drop(fast, "third.png", "green")
    assert filed(fast, "third.png", "green").stat().st_ino == inode


@pytest.fixture(scope="module")
def alice(lab: Lab) -> tuple[str, ...]:
    """What precedes a command of alice, who has a dataset in her home, and a manager of her own."""
    config = f"root: /home/alice/Data\n{CONFIG}"
    lab.run(
        "sh",
        "-ec",
        f"""
        mkdir -p /home/alice/.local/bin /home/alice/.config/sortd
        ln -s /opt/sortd/.venv/bin/fast-sortd /home/alice/.local/bin/sortd
        cat > /home/alice/.config/sortd/config.yaml <<'.'
{config}.
        """,
    )
    make_dataset(lab.srv / ".home")
    lab.run("cp", "-r", "/srv/sortd/.home", "/home/alice/Data")
    lab.run("chown", "-R", "alice:alice", "/home/alice")
    lab.run("loginctl", "enable-linger", "alice")
    number = lab.run("id", "-u", "alice").stdout.strip()
    alice = ("runuser", "-u", "alice", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{number}", "HOME=/home/alice")
    lab.wait(lambda: lab.run(*alice, "systemctl", "--user", "status", check=False).returncode == 0, "alice's manager")
    return alice


def test_the_users_unit_files_in_a_home(lab: Lab, alice: tuple[str, ...]) -> None:
    """A user's own manager runs it on datasets below /home, without root."""
    lab.run(*alice, "sh", "-ec", f"cd /opt/sortd/src\n{documented('sh', 'For one user')}")
    picture("green", 1).save(lab.srv / ".green.png")
    lab.run("install", "-o", "alice", "/srv/sortd/.green.png", "/home/alice/Data/Colours/Images/green.png")
    path = "/home/alice/Data/Colours/Dataset/green/green.png"
    lab.wait(lambda: lab.run("test", "-e", path, check=False).returncode == 0, path)
    told = json.loads(lab.run(*alice, "/opt/sortd/.venv/bin/sortd", "status", "--json").stdout)
    assert (told["running"], told["state_dir"]) == (True, "/home/alice/.local/state/sortd")
    lab.run(*alice, "systemctl", "--user", "reload", "sortd")
    lab.run(*alice, "systemctl", "--user", "stop", "sortd")
    shown = lab.run(
        *alice, "systemctl", "--user", "show", "--value", "--property=Result,ExecMainStatus", "sortd"
    ).stdout
    assert shown.split() == ["success", "0"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_users_review_page_has_a_port_and_a_socket(lab: Lab, alice: tuple[str, ...]) -> None:
    """A browser of this machine and `ssh -L` reach the same page; the address is in alice's state folder."""
    lab.run("ln", "-sf", "/opt/sortd/.venv/bin/sortd", "/home/alice/.local/bin/sortd")  # not that of the fake encoder
    [commands] = re.findall(r"For one user:\n\n((?:    .*\n)+)", DOCUMENT)
    url = lab.run(*alice, "sh", "-ec", f"cd /opt/sortd/src\n{commands}").stdout.strip()
    number = lab.run("id", "-u", "alice").stdout.strip()
    socket = f"/run/user/{number}/sortd-review/review.sock"
    assert lab.run("stat", "--format=%a %U", socket).stdout.split() == ["600", "alice"]
    for options in ((), ("--unix-socket", socket)):
        for target, status in ((url, "303"), ("http://127.0.0.1:8337/", "403")):
            ran = lab.run(
                *alice, "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", *options, target
            )
            assert ran.stdout == status
    lab.run(*alice, "systemctl", "--user", "stop", "sortd-review.socket", "sortd-review.service")


SERVICE = ("/opt/sortd/.venv/bin/sortd", "service")


def test_service_install_starts_it_and_keeps_edited_units(lab: Lab) -> None:
    """It does what docs/service.md describes; an edited unit is neither replaced nor removed."""
    lab.run("sh", "-ec", "systemctl disable --now sortd; rm -f /etc/systemd/system/sortd.service /etc/*/sortd.conf")
    unit = "/etc/systemd/system/sortd.service"
    planned = lab.run(*SERVICE, "install", "--dry-run").stdout
    assert f"would write {unit}" in planned
    assert "would run systemctl enable --now sortd" in planned
    assert lab.run("test", "-e", unit, check=False).returncode == 1
    for _ in range(2):  # again: the unit is as sortd wrote it
        lab.run(*SERVICE, "install")
    assert lab.property("ActiveState") == "active"
    assert lab.property("UnitFileState") == "enabled"
    assert lab.run("systemd-analyze", "verify", unit).stderr == ""
    lab.run("sh", "-ec", f"echo '# mine' >> {unit}")
    refused = lab.run(*SERVICE, "install", check=False)
    assert (refused.returncode, "was edited" in refused.stderr) == (78, True)
    assert "stays" in lab.run(*SERVICE, "uninstall").stdout
    assert lab.property("ActiveState") == "inactive"
    lab.run("sh", "-ec", f"sed -i '/^# mine$/d' {unit}")
    lab.run(*SERVICE, "uninstall")
    assert lab.run("test", "-e", unit, check=False).returncode == 1
    assert lab.run("test", "-e", "/etc/sortd/config.yaml", check=False).returncode == 0
    assert "not installed" in lab.run(*SERVICE, "uninstall", check=False).stderr


def test_service_install_of_a_user_is_that_of_the_manager_of_the_user(lab: Lab, alice: tuple[str, ...]) -> None:
    """It needs no root, and the unit calls the installation that wrote it."""
    said = lab.run(*alice, *SERVICE, "install", "--user").stdout
    unit = "/home/alice/.config/systemd/user/sortd.service"
    assert f"write {unit}" in said
    assert "ExecStart=/opt/sortd/.venv/bin/sortd run" in lab.run("cat", unit).stdout
    shown = lab.run(*alice, "systemctl", "--user", "is-enabled", "sortd").stdout
    assert shown.strip() == "enabled"
    lab.run(*alice, *SERVICE, "uninstall", "--user")
    assert lab.run("test", "-e", unit, check=False).returncode == 1


@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="systemd runs here")
def test_service_install_without_systemd_says_so() -> None:
    """The message names what is missing and what to do instead; a dry run needs no systemd."""
    refused = sortd("service", "install", "--user")
    assert (refused.code, "systemd does not run here" in refused.err) == (78, True)
